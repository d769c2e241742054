"""What a value of a traced graph is: its site and names, the operation that made it, its role, and who shares its storage."""

from graphreg.ir.aliasing import Aliases, of_body
from graphreg.ir.comparison import Literals, compared, difference, flat, is_nan, name_of
from graphreg.ir.containers import building, builds
from graphreg.ir.layout import apart, clone, laid_out, overlaps
from graphreg.ir.modes import Graphs, choose
from graphreg.ir.naming import COUNTED, Namer, add_label, label_node, label_output, parts
from graphreg.ir.operations import (
    IN_PLACE_NAMES,
    PACKS,
    SIZE_ATTRIBUTES,
    SIZES,
    SPLITS,
    STACKS,
    WRAPPED,
    Operations,
    function_name,
    gives_tuple,
    is_drop_path,
    is_dropout_module,
    is_in_place,
    is_integer,
    is_leaf,
    is_port,
    is_size,
    is_stack,
    nodes_in,
    stacks,
)
from graphreg.ir.precision import brought, has_float64, widest
from graphreg.ir.provenance import chains, convolution, one_value_over_again
from graphreg.ir.random_ops import Kind, Own, find, rate_of
from graphreg.ir.record import IGNORED, PREFIX, RULES, STATE, State, check_names, held_of, plain, registered, reserved, state_of
from graphreg.ir.roles import CELL_PORTS, CROSSES, deep_nodes, is_region, labels_of, site_nodes, value_sites
from graphreg.ir.selector import Missing, Pattern, Selector, complain, exactly, select, strings, strings_of, unmatched
from graphreg.ir.serialize import blank_like, copied, freeze, thaw
from graphreg.ir.shape_guards import ASSERTIONS, Place, assert_sizes, described, fixed, held_at, holds
from graphreg.ir.site import ROLES, Label, Names, Site, columns, dtype_text, shape_text
from graphreg.ir.source_location import OWN_FOLDERS, Origin, origin_now, origin_of, origin_told, short
from graphreg.ir.spelling import check_arguments, spelled
from graphreg.ir.steps import Steps, mean_over_pairs
from graphreg.ir.storage_effects import REGION, Effects
from graphreg.ir.storage_probes import told

__all__ = [
    "ASSERTIONS", "CELL_PORTS", "COUNTED", "CROSSES", "IGNORED", "IN_PLACE_NAMES", "OWN_FOLDERS", "PACKS", "PREFIX", "REGION",
    "ROLES", "RULES", "SIZES", "SIZE_ATTRIBUTES", "SPLITS", "STACKS", "STATE", "WRAPPED", "Aliases", "Effects", "Graphs", "Kind",
    "Label", "Literals", "Missing", "Namer", "Names", "Operations", "Origin", "Own", "Pattern", "Place", "Selector", "Site", "State",
    "Steps", "add_label", "apart", "assert_sizes", "blank_like", "brought", "building", "builds", "chains", "check_arguments",
    "check_names", "choose", "clone", "columns", "compared", "complain", "convolution", "copied", "deep_nodes", "described",
    "difference", "dtype_text", "exactly", "find", "fixed", "flat", "freeze", "function_name", "gives_tuple", "has_float64",
    "held_at", "held_of", "holds", "is_drop_path", "is_dropout_module", "is_in_place", "is_integer", "is_leaf", "is_nan", "is_port",
    "is_region", "is_size", "is_stack", "label_node", "label_output", "labels_of", "laid_out", "mean_over_pairs", "name_of",
    "nodes_in", "of_body", "one_value_over_again", "origin_now", "origin_of", "origin_told", "overlaps", "parts", "plain", "rate_of",
    "registered", "reserved", "select", "shape_text", "short", "site_nodes", "spelled", "stacks", "state_of", "strings", "strings_of",
    "thaw", "told", "unmatched", "value_sites", "widest",
]  # fmt: skip
