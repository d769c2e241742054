"""Facts about the values of a traced graph: their sites, names and roles, the operations that made them, and which share storage.

Almost every folder that docs/architecture.md lists after ``ir`` imports this one. Nothing here traces a model or edits one. Open
``site.py`` first, which says what a site is, then ``selector.py``, which says how a string finds sites.
"""

from graphreg.ir.aliasing import Aliases, of_body
from graphreg.ir.buffer_constants import BufferConstants
from graphreg.ir.call_records import (
    CallRecord,
    Leaf,
    call_key,
    doubt_plain,
    in_containers,
    record_module_calls,
    recorded_calls,
    rename_in_calls,
    replaced_leaf,
)
from graphreg.ir.call_structures import CallStructures, CallText
from graphreg.ir.cell_states import cell_call, state_before
from graphreg.ir.codegen_fixes import check_arguments, spelled
from graphreg.ir.comparison import Literals, compared, described_node, difference, digest, flat, is_nan, literals_apart, name_of
from graphreg.ir.containers import building, builds, end_of, loss_of
from graphreg.ir.contents import (
    FOREIGN,
    TensorKind,
    called_by_foreign_code,
    calling_module,
    contents_of,
    copied_contents,
    detached,
    may_change,
    number_kind,
    shown_contents,
    unshared,
)
from graphreg.ir.convolution_axes import convolution, is_elementwise
from graphreg.ir.dataflow import carries_derivative, reached, sizes_of
from graphreg.ir.layer_calls import LAYER, PARAMETERS, call_with, instead_of
from graphreg.ir.layout import apart, clone, laid_out, overlaps
from graphreg.ir.local_shards import measured_shard
from graphreg.ir.made_objects import MadeObject, held_objects, is_record, making
from graphreg.ir.metadata import (
    Addition,
    Kind,
    ModuleCalls,
    add_label,
    addition_of,
    calls_of,
    is_added,
    is_kind,
    is_labelled,
    is_marked,
    is_native_dropout,
    is_replaced_call,
    label_site,
    mark,
    own_labels,
    own_name,
    record_calls,
    scope_of,
    surrounding_calls,
    unmark,
)
from graphreg.ir.module_calls import STACK, ModuleCall, blocks, record_stacks
from graphreg.ir.module_record import (
    IGNORED,
    ORIGINAL,
    PLACED,
    PREFIX,
    RULES,
    STATE,
    ModelFacts,
    ModuleRecord,
    check_names,
    plain,
    registered,
    reserved,
    specialized_arguments,
    state_of,
    traced_model,
)
from graphreg.ir.naming import COUNTED, Namer, elements, identifier, label_node, label_output
from graphreg.ir.operation_probes import declared
from graphreg.ir.operations import (
    IN_PLACE_NAMES,
    NORM_MODULES,
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
    is_port,
    is_pythons,
    is_single_operation,
    is_size,
    is_stack,
    nodes_in,
    stacks,
)
from graphreg.ir.parameter_reads import ParameterRead, ParameterReads, alias_paths, parameter_reads
from graphreg.ir.precision import brought, has_float64, widest, with_values
from graphreg.ir.provenance import chains, one_value_over_again
from graphreg.ir.random_ops import DropoutKind, NativeDropout, find_native_dropouts, rate_of
from graphreg.ir.roles import BOUNDARY, CELL_PORTS, deep_nodes, is_region, labels_of, signal_nodes, site_nodes, value_sites
from graphreg.ir.selector import (
    Missing,
    Pattern,
    Selector,
    complain,
    escaped,
    exactly,
    select,
    select_among,
    strings,
    strings_of,
    unmatched,
)
from graphreg.ir.serialize import blank_like, copied, freeze, thaw
from graphreg.ir.shape_guards import (
    ASSERTIONS,
    SIZE_ASSERTIONS,
    Assert,
    InputPlace,
    assert_sizes,
    described,
    fixed,
    has_keys,
    specialized_to,
)
from graphreg.ir.site import ROLES, Label, Names, Role, Site, dtype_text, shape_text
from graphreg.ir.source_location import LIBRARY_FOLDERS, Origin, origin_in_trace, origin_now, origin_of, short
from graphreg.ir.terminal import Lines, Paragraph, Printed, check_width, coloured, html, marked, paint, text, width_now
from graphreg.ir.text_table import Table
from graphreg.ir.time_steps import Steps, mean_over_counted, mean_over_pairs
from graphreg.ir.train_eval import ModeGraphs, choose
from graphreg.ir.units import Units
from graphreg.ir.views_and_writes import REGION, Effects

__all__ = [
    "ASSERTIONS", "BOUNDARY", "CELL_PORTS", "COUNTED", "FOREIGN", "IGNORED", "IN_PLACE_NAMES", "LAYER", "LIBRARY_FOLDERS", "NORM_MODULES",
    "ORIGINAL", "PACKS", "PARAMETERS", "PLACED", "PREFIX", "REGION", "ROLES", "RULES", "SIZES", "SIZE_ASSERTIONS", "SIZE_ATTRIBUTES",
    "SPLITS", "STACK", "STACKS", "STATE", "WRAPPED", "Addition", "Aliases", "Assert", "BufferConstants", "CallRecord", "CallStructures",
    "CallText", "DropoutKind", "Effects", "InputPlace", "Kind", "Label", "Leaf", "Lines", "Literals", "MadeObject", "Missing", "ModeGraphs",
    "ModelFacts", "ModuleCall", "ModuleCalls", "ModuleRecord", "Namer", "Names", "NativeDropout", "Operations", "Origin", "Paragraph",
    "ParameterRead", "ParameterReads", "Pattern", "Printed", "Role", "Selector", "Site", "Steps", "Table", "TensorKind", "Units",
    "add_label", "addition_of", "alias_paths", "apart", "assert_sizes", "blank_like", "blocks", "brought", "building", "builds", "call_key",
    "call_with", "called_by_foreign_code", "calling_module", "calls_of", "carries_derivative", "cell_call", "chains", "check_arguments",
    "check_names", "check_width", "choose", "clone", "coloured", "compared", "complain", "contents_of", "convolution", "copied",
    "copied_contents", "declared", "deep_nodes", "described", "described_node", "detached", "difference", "digest", "doubt_plain",
    "dtype_text", "elements", "end_of", "escaped", "exactly", "find_native_dropouts", "fixed", "flat", "freeze", "function_name",
    "gives_tuple", "has_float64", "has_keys", "held_objects", "html", "identifier", "in_containers", "instead_of", "is_added",
    "is_drop_path", "is_dropout_module", "is_elementwise", "is_in_place", "is_kind", "is_labelled", "is_marked", "is_nan",
    "is_native_dropout", "is_port", "is_pythons", "is_record", "is_region", "is_replaced_call", "is_single_operation", "is_size",
    "is_stack", "label_node", "label_output", "label_site", "labels_of", "laid_out", "literals_apart", "loss_of", "making", "mark",
    "marked", "may_change", "mean_over_counted", "mean_over_pairs", "measured_shard", "name_of", "nodes_in", "number_kind", "of_body",
    "one_value_over_again", "origin_in_trace", "origin_now", "origin_of", "overlaps", "own_labels", "own_name", "paint", "parameter_reads",
    "plain", "rate_of", "reached", "record_calls", "record_module_calls", "record_stacks", "recorded_calls", "registered",
    "rename_in_calls", "replaced_leaf", "reserved", "scope_of", "select", "select_among", "shape_text", "short", "shown_contents",
    "signal_nodes", "site_nodes", "sizes_of", "specialized_arguments", "specialized_to", "spelled", "stacks", "state_before", "state_of",
    "strings", "strings_of", "surrounding_calls", "text", "thaw", "traced_model", "unmark", "unmatched", "unshared", "value_sites",
    "widest", "width_now", "with_values",
]  # fmt: skip
