"""Private parts of torch, each behind a function that says what it finds out, and why graphreg needs it.

No other room uses a private name of torch. After a change to a new torch version, run ``tests/torch_internals/test_canaries.py``: it tests
each part that is used here, so a part that torch changed is found there and repaired here. A function that is called often, or that
Dynamo traces, is torch's own, under a name of graphreg's.
"""

from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import (
    NO_BACKWARD,
    PRIVATE_FACTS,
    PRIVATE_STORAGE,
    backward_task,
    base_of,
    custom_operators,
    first_scale,
    has_no_formula,
    in_backward,
    is_forward_mode,
    is_plain_view,
    materialized,
    number_of_storage,
    recorded_in_operator,
    same_view,
    scale_tensor,
    storage_number,
    version_of,
    wrap_engine,
)
from graphreg.torch_internals.checkpointing import before_checkpoints, next_region
from graphreg.torch_internals.config import CONFIGS, DYNAMO, FUNCTORCH, INDUCTOR, default_of, has_setting
from graphreg.torch_internals.dynamo import (
    CALLERS_OF_FORWARD,
    TELLS_SKIPPED_CODE,
    CapturedCode,
    CompiledCall,
    asking_wrapper,
    backend_in,
    backend_named,
    captured_code,
    compile_record_of,
    compiled_call,
    copy_notes,
    copy_source,
    first_arguments,
    function_in,
    function_of,
    graph_break,
    guard_identity,
    guard_value,
    left_to_eager,
    name_in,
    on_compilation_start,
    skip_frame,
    skipped_code,
    source_of,
    strict_limit,
    translator,
    without_source,
)
from graphreg.torch_internals.export import (
    SOLVER_LOGGER,
    evaluated,
    example_sizes,
    give_proxy,
    module_behind,
    proxy_of,
    silence_export,
    take_module_calls,
)
from graphreg.torch_internals.fake_tensors import (
    FAKE_LOGGER,
    FakeCopyMode,
    FakeTensorMode,
    fake_mode,
    has_function_table,
    is_fake,
    make_function_table,
    size_decisions,
    take_assignments,
)
from graphreg.torch_internals.functorch import (
    CHUNKED,
    Chunk,
    batch_positions,
    chunks,
    enters_levels,
    in_chunks,
    innermost_transform,
    is_lent,
    is_transform_step,
    is_wrapped,
    leaving_no_level,
    level_of,
    one_level_below,
    transform_level,
    transforms,
    unwrapped,
    vmaps,
    without_transforms,
)
from graphreg.torch_internals.fx import (
    define_named_tuples,
    defines_named_tuples,
    is_traced,
    share_emitter,
    snake_case,
    take_as_one,
    traces_here,
    value_name,
    wrapped_functions,
)
from graphreg.torch_internals.inductor import graph_pass, inductor_with, lower, pointwise, strides_of, without_autograd_cache
from graphreg.torch_internals.interpreter import at_rest, collector_at_rest, deep_enough, with_own_code
from graphreg.torch_internals.modules import (
    CALL_HOOKS,
    COMPILED_CALL,
    STATE_HOOKS,
    TENSOR_REGISTRIES,
    BatchNormBase,
    ConstantPadBase,
    ConvolutionBase,
    DropoutBase,
    bound_call,
    compiles_itself,
    drop_forward_hooks,
    forward_hooks,
    has_backward_hooks,
    has_global_hook,
    kernel_weights,
    leave_mask_unread,
    original_of,
    plain_transformers,
    take_state_version,
    weight_names,
)
from graphreg.torch_internals.node_names import node_namer
from graphreg.torch_internals.operators import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    assert_async,
    has_kernel,
    is_name_of_namespace,
    overload_name,
    packet_of,
    qualified_name,
    safe_softmax,
    schema_of,
)
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.random_state import (
    ModuleStack,
    draws_watched,
    on_seeding,
    quiet,
    randomness,
    regions,
    restore_randomness,
    with_draws_restored,
)
from graphreg.torch_internals.torch_modes import (
    TorchDispatchMode,
    is_exporting,
    is_functionalized,
    is_gradient_switch,
    jit_trace,
    operator_modes,
    without_functions,
    without_modes,
    without_proxies,
)
from graphreg.torch_internals.trace_state import restore_after_trace, restore_fx_patches
from graphreg.torch_internals.versions import known_versions, run_canaries, warn_if_untested

__all__ = [
    "CALLERS_OF_FORWARD", "CALL_HOOKS", "CHUNKED", "COMPILED_CALL", "CONFIGS", "DYNAMO", "FAKE_LOGGER", "FUNCTORCH", "INDUCTOR",
    "NO_BACKWARD", "PRIVATE_FACTS", "PRIVATE_STORAGE", "SOLVER_LOGGER", "STATE_HOOKS", "TELLS_SKIPPED_CODE", "TENSOR_REGISTRIES",
    "BatchNormBase", "CapturedCode", "Changes", "Chunk", "CompiledCall", "ConstantPadBase", "ConvolutionBase", "DropoutBase",
    "FakeCopyMode", "FakeTensorMode", "HigherOrderOperator", "ModuleStack", "OpOverload", "OpOverloadPacket", "TorchDispatchMode",
    "asking_wrapper", "assert_async", "at_rest", "backend_in", "backend_named", "backward_task", "base_of", "batch_positions",
    "before_checkpoints", "bound_call", "captured_code", "chunks", "collector_at_rest", "compile_record_of", "compiled_call",
    "compiles_itself", "copy_notes", "copy_source", "custom_operators", "deep_enough", "default_of", "define_named_tuples",
    "defines_named_tuples", "draws_watched", "drop_forward_hooks", "enters_levels", "evaluated", "example_sizes", "fake_mode",
    "first_arguments", "first_scale", "forward_hooks", "function_in", "function_of", "give_proxy", "graph_break", "graph_pass",
    "guard_identity", "guard_value", "has_backward_hooks", "has_function_table", "has_global_hook", "has_kernel", "has_no_formula",
    "has_setting", "in_backward", "in_chunks", "inductor_with", "innermost_transform", "is_exporting", "is_fake", "is_forward_mode",
    "is_functionalized", "is_gradient_switch", "is_lent", "is_name_of_namespace", "is_plain_view", "is_traced", "is_transform_step",
    "is_wrapped", "jit_trace", "kernel_weights", "known_versions", "leave_mask_unread", "leaving_no_level", "left_to_eager", "level_of",
    "lower", "make_function_table", "materialized", "module_behind", "name_in", "next_region", "node_namer", "number_of_storage",
    "on_compilation_start", "on_seeding", "one_level_below", "operator_modes", "original_of", "overload_name", "packet_of",
    "plain_transformers", "pointwise", "proxy_of", "pytree", "qualified_name", "quiet", "raise_interrupt", "randomness",
    "recorded_in_operator", "regions", "restore_after_trace", "restore_fx_patches", "restore_randomness", "run_canaries", "safe_softmax",
    "same_view", "scale_tensor", "schema_of", "share_emitter", "silence_export", "size_decisions", "skip_frame", "skipped_code",
    "snake_case", "source_of", "storage_number", "strict_limit", "strides_of", "take_as_one", "take_assignments", "take_module_calls",
    "take_state_version", "traces_here", "transform_level", "transforms", "translator", "unwrapped", "value_name", "version_of", "vmaps",
    "warn_if_untested", "weight_names", "with_draws_restored", "with_own_code", "without_autograd_cache", "without_functions",
    "without_modes", "without_proxies", "without_source", "without_transforms", "wrap_engine", "wrapped_functions",
]  # fmt: skip
