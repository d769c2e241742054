"""The base classes of all regularizers: a regularizer is a selector plus a tensor function. To write one, subclass Splice or Penalty.

    class RowNorm(Penalty, keys=("row_norm",), on="parameters"):
        def __call__(self, w: Tensor) -> Tensor:
            return w.flatten(1).norm(dim=1).mean()

The names of the arguments of ``__call__`` say what the engine passes to it:

- ``z``: the value at a site; ``w``: a parameter. A splice on parameters runs once in each call, and
  replaces ``w`` where it is read.
- ``values``: the values, or parameters, of all selected sites, in a dict by the sites' names.
- ``weight``: the strength, a 0-d tensor.
- ``noise``, for a splice: the object that draws random numbers, see ``Noise``.
- ``lengths``, for a splice: the number of valid (not padded) steps of each example, int64 [batch],
  or None. The option ``lengths`` names the model's input that carries these numbers, or a mask of
  steps.
- ``module_input``, for a splice at the output of a module: the value that the module got as its
  input, in the shape of ``z``.
- ``previous``, for a splice at a state that a recurrent cell returns: the state that the cell got;
  zeros if the cell got none.
- ``steps`` and ``lengths``, for a penalty: a sequence, [time, batch, units], and the number of
  valid steps of each example, int64 [batch] or None. The options ``time_axis`` and ``lengths`` say
  how to read a value as a sequence.
- ``counted``, for a penalty that takes ``z`` or ``units`` and has the option ``lengths``: bool,
  True at the steps that count, with the axes of ``z``, of which all but time and batch have the
  size 1, or [samples]; None if the option is None. ``z`` or ``units`` is zero at the other steps.
  ``mean_over_counted`` averages over what counts.
- ``units``, for a penalty: the value as a matrix, [samples, units]. The units lie along the axis
  that the option ``axis`` gives. If it is None, they lie along axis 1 of a convolution's value, and
  along the last axis of any other value. All other axes become samples. For a splice: the value
  with the axis of units moved to the end, [..., units]; the formula returns the same shape.
- ``state``, for a formula that takes one site at a time: tensors by name that are kept for this
  site from call to call. ``init_state`` makes them. Those that are ``nn.Parameter`` are trained;
  the formula may replace the others, by returning ``(value, new_state)``.
- the name of an option that is annotated ``ModelInput``, for example ``mask: ModelInput = None``:
  the tensor that the call of the model has for the argument that the option names, or None if the
  option is None. If the tensor is floating-point, it comes in the dtype in which the formula
  computes.
- ``vjp``, for a penalty: a function that computes vector-Jacobian products of the values at all
  selected sites, with respect to the values that the option ``wrt`` selects, see ``Vjp``.

A splice acts in train mode. If its class has a method ``in_eval``, the engine replaces the value by
the result of this method in eval mode. The arguments of ``in_eval`` mean the same as those of
``__call__``: it takes ``z`` or ``units``, and may take ``weight``, ``state``, ``previous``,
``module_input`` and inputs of the model. If its class has a method ``penalty``, the splice has a
penalty of its own, which this method computes from ``state``.

The engine averages the results of a penalty over its sites, or adds them if the option
``reduction`` is ``"sum"``; a formula that takes ``values`` or ``vjp`` gives one result for all
sites. Then the engine multiplies by the strength. For all regularizers, the engine takes care of
precision and of train and eval mode. A regularizer never sees an fx node.

A penalty on parameters that has the option ``by`` and a method ``prox`` may act by a proximal step
in place of a gradient (``by="prox"``): ``graphreg.prox_`` calls the method after each step of the
optimizer.

The engine itself reads eight options, if the class has them: ``reduction``, ``time_axis``,
``lengths``, ``wrt``, ``always``, ``axis``, ``share_axes`` and ``by``; see ``EngineOptions``. Declare
such an option as a field, e.g. ``reduction: str = "mean"``. Any other option concerns the class
alone.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

import torch
from torch import nn

from graphreg.errors import ROUNDS_TO_1, RegularizerError, no_number, number_of
from graphreg.ir.random_ops import DropoutKind
from graphreg.ir.selector import Selector, strings
from graphreg.ir.site import Role, Site
from graphreg.regularizer import registry
from graphreg.regularizer.by_depth import ByDepth, extremes, has_schedule, read_strength
from graphreg.regularizer.engine_options import EngineOptions
from graphreg.regularizer.formula_arguments import VJP_NAMES, formula_arguments, in_eval_arguments, penalty_arguments
from graphreg.regularizer.model_inputs import check_given_inputs, check_input_options, input_options, named_inputs
from graphreg.regularizer.options import STRENGTH, NotGiven, check_option_names, required, strength_names, taking_strength
from graphreg.regularizer.sequences import check_sequence_options, require_selector
from graphreg.regularizer.shared_axes import share_axes
from graphreg.regularizer.units import check_axis
from graphreg.schedules import VaryingStrength

On = Literal["values", "parameters"]
Separable = Literal["nothing", "examples", "elements"]
PLAIN = (str, int, float, tuple, NoneType)  # the types of values that ``to_dict`` leaves unchanged


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class Regularizer:
    """Base class of ``Splice`` and ``Penalty``; subclass one of those two.

    Attributes:
        pattern: A selector of sites; ``"*"`` means the class's default sites.
        weight: The strength, a finite number in the class's range, or ``by_depth(first, last)``, or
            a schedule (``graphreg.schedules``), or one of these as plain data, such as
            ``{"linear": [0, 0.5, 1000]}``.
        strength: Another name of ``weight``.
        name: The name in penalties, strengths, report and diff; None to derive it from the keyword
            or the class's key.
        expect: The number of sites that ``pattern`` must select; None for any number.
        on: The kind of site that the class acts on: ``"values"`` or ``"parameters"``.
        takes: The names of the arguments of ``__call__``, which say what graphreg passes to it.
        takes_vjp: Whether ``__call__`` takes the argument ``vjp``.
        input_options: The options that are annotated ``ModelInput``.
        keys: The keywords of ``graphreg.regularize`` that mean this class.
        default_role: The role of the default sites of a class that acts on values. If it is
            ``"output"``, losses are left out.
        usual: The default sites in words, for messages.
        may_act_on: The kinds of site that a subclass may choose for ``on``.
        must_take: The name of an argument that ``__call__`` must have; ``""`` if there is no such
            argument.
        min_dims: The least number of dims that a parameter must have for the class to act on it.
        min_samples: For a formula that takes ``units``: the fewest samples that it accepts.
        min_units: For a formula that takes ``units``: the fewest units that it accepts.
        over_batch: For a penalty on values: True if the penalty of a batch is not the mean of the
            penalties of its parts, because the formula is a function of means over the batch, as a
            covariance is. If there are several ranks, the report then says that each computes the
            penalty from its own batch.
    """

    pattern: Selector = "*"
    weight: float = required()
    _: KW_ONLY
    strength: float = required()
    name: str | None = None
    expect: int | None = None

    # ``strength`` stands among the fields for type checkers alone. ``taking_strength`` takes it for ``weight``.
    del __annotations__["strength"]
    if not TYPE_CHECKING:
        strength = property(lambda self: self.weight)
    # the name by which the strength was given, for messages: ``weight`` or ``strength``
    strength_option: ClassVar[str] = "weight"

    on: ClassVar[On] = "values"
    takes: ClassVar[tuple[str, ...]] = ()
    takes_vjp: ClassVar[bool] = False
    input_options: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[tuple[str, ...]] = ()
    default_role: ClassVar[Role] = "hidden"
    usual: ClassVar[str] = "the hidden values"
    may_act_on: ClassVar[tuple[str, ...]] = ("values", "parameters")
    must_take: ClassVar[str] = ""
    min_dims: ClassVar[int] = 2
    min_samples: ClassVar[int] = 1
    min_units: ClassVar[int] = 1
    over_batch: ClassVar[bool] = False
    # what ``model_inputs`` returns; each instance has its own
    _model_inputs: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, keys: Sequence[str] = (), on: On | None = None, **more: Any) -> None:
        # ``key=`` is a likely slip: Python's own TypeError for it would not name ``keys=``.
        if "key" in more:
            key = more["key"]
            right = key if isinstance(key, tuple) else (key,)
            raise RegularizerError(f"{cls.__name__}: key={key!r} is not allowed; write keys={right!r}.")

        super().__init_subclass__(**more)
        # So a subclass needs no decorator: what it annotates becomes an option.
        dataclass(frozen=True)(cls)
        if STRENGTH in strength_names(cls):
            setattr(cls, "__init__", taking_strength(cls.__init__))  # noqa: B010 (mypy refuses the plain assignment)
        cls.on = on or cls.on
        if cls.on not in cls.may_act_on:
            raise RegularizerError(f"{cls.__name__}: on={cls.on!r} is not allowed; it is {' or '.join(map(repr, cls.may_act_on))}.")

        if isinstance(keys, str):
            raise RegularizerError(f"{cls.__name__}: keys={keys!r} is one string; write keys=({keys!r},).")

        # A subclass with other default sites needs other words for them, unless it gives its own.
        if "usual" not in cls.__dict__ and cls.on == "parameters":
            cls.usual = f"the parameters of {cls.min_dims} dims or more" + (", without biases and norms" if cls.min_dims > 1 else "")
        elif "usual" not in cls.__dict__ and "default_role" in cls.__dict__:
            cls.usual = "the outputs, losses left out" if cls.default_role == "output" else f"the {cls.default_role} values"
        cls.keys, cls.input_options = tuple(keys), input_options(cls)

        if "__call__" in cls.__dict__:
            makes_state = cls.init_state is not Regularizer.init_state
            cls.takes = formula_arguments(cls, issubclass(cls, Splice), [field.name for field in fields(cls)], makes_state)
            cls.takes_vjp = not set(VJP_NAMES).isdisjoint(cls.takes)
            if cls.must_take not in ("", *cls.takes) and not cls.has_penalty():
                raise RegularizerError(f"{cls.__name__}.__call__ does not take {cls.must_take}: set_strength would change nothing.")

        check_input_options(cls)
        registry.register(cls)

    def __new__(cls, *args: Any, **options: Any) -> Regularizer:
        # Here, because the generated __init__ would raise a TypeError that suggests no names.
        check_option_names(cls, args, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # One form for each selector: a string, a tuple of several, or a function.
        texts = strings(self.pattern)
        object.__setattr__(self, "pattern", texts[0] if len(texts) == 1 else texts or self.pattern)
        object.__setattr__(self, "weight", self._number(self.strength_option, read_strength(self.weight)))

        if self.expect is not None and (type(self.expect) is not int or self.expect < 0):
            raise RegularizerError(f"{type(self).__name__}: expect={self.expect!r} is no count of sites; give a whole number.")
        if self.name is not None and not (isinstance(self.name, str) and self.name.isidentifier() and not keyword.iskeyword(self.name)):
            raise RegularizerError(
                f"{type(self).__name__}: name={self.name!r} is not allowed; a name is one Python identifier and no keyword."
            )

        if type(self).__call__ is Regularizer.__call__:
            raise RegularizerError(f"{type(self).__name__} has no __call__: write its formula there.")
        if "steps" in self.takes:
            require_selector(self)
        if {"steps", "lengths", "counted"}.intersection(self.takes) or "time" in self.engine_options.share_axes:
            check_sequence_options(self)
        if "units" in self.takes:
            check_axis(self)

        check_given_inputs(self)
        object.__setattr__(self, "_model_inputs", named_inputs(self))
        self._check_weight(self.weight)

    def _check_weight(self, weight: float) -> None:
        """Run ``check`` with each extreme of the strength; refuse ``by_depth`` if the formula takes all sites at once."""
        # ``check`` reads ``self.weight``, so each extreme of a schedule takes its place once.
        for number in extremes(weight) if has_schedule(weight) else [weight]:
            try:
                self._check_number(number)
            except RegularizerError as error:
                raise error if number is weight else RegularizerError(f"{error} The schedule {weight!r} has this number.") from None

        # As a number, a ByDepth is the end further from 0, so each end is checked by itself.
        for end in extremes(weight) if isinstance(weight, ByDepth) else ():
            self._check_weight(end)
        object.__setattr__(self, "weight", weight)
        if isinstance(weight, ByDepth) and not self.by_site:
            raise RegularizerError(
                f"{type(self).__name__}: {self.strength_option}={weight!r} is not allowed, because the formula takes all sites at once. "
                "Give a number."
            )

    def _check_number(self, number: float) -> None:
        object.__setattr__(self, "weight", number)
        self.check()
        # Formulas compute in float32, where a rate just below 1 would be 1, and 1 / (1 - rate) infinite.
        if ROUNDS_TO_1 <= number < 1:
            object.__setattr__(self, "weight", 1.0)
            try:
                self.check()
            except RegularizerError as error:
                text = str(error).replace("=1.0 ", f"={number!r} ", 1)
                raise RegularizerError(f"{text} In float32, which formulas use, it is 1.0.") from None

    @classmethod
    def has_penalty(cls) -> bool:
        """Whether the class has an entry in the penalties of a call: it is a penalty, or a splice with a method ``penalty``."""
        return True

    def init_state(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of a site before the first call, and after a reset: tensors by name, on the device of ``like``.

        A class must have this method if its formula takes ``state``. An ``nn.Parameter`` becomes a
        parameter of the rewritten module. If the formula returns a new state, it must have the
        names and shapes of those tensors in this dict that are not ``nn.Parameter``.

        Args:
            like: If the site is a parameter, its values. If it is a value, zeros of the shape and
                dtype that the value had when the model was traced; if the formula takes ``units``,
                with the axis of units at the end; if it takes ``steps``, the sequence.
        """
        raise NotImplementedError(f"{type(self).__name__} has no init_state: write it, and return the state that the formula takes.")

    @property
    def is_scheduled(self) -> bool:
        """Whether the strength changes while the model trains."""
        return has_schedule(self.weight)

    @property
    def by_prox(self) -> bool:
        """Whether ``graphreg.prox_`` applies the penalty, which then has no entry in the penalties of a call."""
        return self.engine_options.by == "prox"

    @property
    def by_site(self) -> bool:
        """Whether each site may have a strength of its own, which requires that the formula takes one site at a time."""
        return isinstance(self, Splice) or not (self.takes_vjp or "values" in self.takes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __call__: write the formula there.")

    def check(self) -> None:
        """Raise RegularizerError for an option that is out of range. Subclasses extend this method with ``self.require(...)``."""
        self.require(self.weight >= 0, "weight", "0 or more")

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raise RegularizerError unless ``condition`` holds. The message has the option ``field``, its value, and ``allowed``."""
        if not condition:
            name = self.strength_option if field == "weight" else field
            who = f"{type(self).__name__} {self.name}" if self.name else type(self).__name__
            raise RegularizerError(f"{who}: {name}={getattr(self, field)!r} is not allowed; {name} must be {allowed}.")

    def require_number(self, field: str, fits: Callable[[float], bool], allowed: str) -> None:
        """Raise RegularizerError unless the option ``field`` is a finite number for which ``fits`` returns True.

        ``allowed`` describes such numbers in the message, e.g. ``"above 0"``.
        """
        value = getattr(self, field)
        if value is NotGiven.OPTION:
            kind, key = type(self).__name__, self.keys[0] if self.keys else "key"
            raise RegularizerError(
                f"{kind}: {field} was not given; it must be a number {allowed}. Write "
                f"{kind}({self.pattern!r}, {self.weight:g}, {field}=...), or "
                f"{key}={{'{self.strength_option}': {self.weight:g}, '{field}': ...}}."
            )
        number = number_of(value)
        # A bool is a number to Python: without this check, True would pass as 1.
        self.require(number is not None and not isinstance(value, bool) and fits(number), field, f"a number {allowed}")
        object.__setattr__(self, field, number)

    @property
    def engine_options(self) -> EngineOptions:
        """The options that graphreg itself reads, such as ``reduction``."""
        return EngineOptions.of(self)

    @property
    def model_inputs(self) -> Mapping[str, str]:
        """The inputs of the model that the formula takes: a mapping of the formula's argument to the name of the input."""
        return self._model_inputs

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        """Return those of ``sites`` that the selector ``"*"`` means. ``sites``: all selectable sites of the kind that the class acts on."""
        if self.on == "parameters":
            # A bias and a gain may have two dims, too: ``LayerNorm((channels, height))``. A class that acts on vectors means them, too.
            return [site for site in sites if not (site.norm and self.min_dims > 1)]
        return [site for site in sites if site.role == self.default_role and not (site.loss and site.role == "output")]

    def why_not(self, site: Site) -> str:
        """Return why the class cannot act at a selected site, and what to do instead; ``""`` if it can.

        If the text is not ``""``, ``graphreg.plan`` raises RegularizerError with it.
        """
        return ""

    def note(self, sites: Sequence[Site], weight: float) -> str:
        """Return a line that the report shows for this regularizer; ``""`` for none."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return the name of the class and the options as plain data.

        Texts, numbers, tuples and None are left unchanged. A schedule, a ``by_depth(...)`` and any
        other object become their ``repr``.
        """
        options = {each.name: getattr(self, each.name) for each in fields(self)}
        plain = {k: v if isinstance(v, PLAIN) and not isinstance(v, VaryingStrength) else repr(v) for k, v in options.items()}
        return {"class": type(self).__name__, **plain}

    def _number(self, field: str, value: object) -> float:
        if not isinstance(value, bool) and (number := number_of(value)) is not None:
            return value if isinstance(value, VaryingStrength) else number
        kind = type(self).__name__
        cure = f"Write {kind}('*', 0.1): the selector first, the {field} second."
        if value is NotGiven.OPTION:
            raise RegularizerError(f"{kind}: {field} was not given; it must be a finite number. {cure}")
        raise RegularizerError(no_number(f"{kind}: {field}", value, cure))


class Splice(Regularizer):
    """A regularizer that replaces a value or a parameter in train mode.

    ``__call__`` takes ``z`` or ``w``, and returns a tensor of the same shape and dtype. A parameter
    is replaced only where the forward reads it. The parameter itself does not change, and penalties
    measure the parameter, not its replacement.

    Attributes:
        rng: An int or torch.Generator that seeds this splice alone; None to draw from a stream of
            the rewritten module's seed.
        readers: A splice on parameters acts only where a module of one of these classes reads the
            parameter; ``()`` means any module.
        off_at_zero: Whether the splice leaves values as they are at strength 0.
        native_kinds: The kinds of native dropout that do the same to a value, such as ``"element"``
            for the dropout of single elements. A plan says where the splice and dropout of such a
            kind act on the same value. ``graphreg.types.NativeDropout`` lists the kinds.
        raises_variance: Whether the splice raises the variance of a value, in train mode only, as
            dropout and added noise do. A plan then says where it does known harm: before a batch
            norm, and several times on a residual trunk.
        separable: What the formula treats one by one: ``"elements"``, ``"examples"`` (along axis
            0), or ``"nothing"``. If ranks divide a value among themselves, each can then replace
            its own part. The draws must have the shape of z, except along the axes that the methods
            of ``noise`` get as ``shared=``.
    """

    _: KW_ONLY
    rng: Any = None

    must_take: ClassVar[str] = "weight"
    readers: ClassVar[tuple[type[nn.Module], ...]] = ()
    # the argument names of ``in_eval``; empty for a class without that method
    takes_in_eval: ClassVar[tuple[str, ...]] = ()
    # the argument names of ``penalty``; empty for a class without that method
    penalty_takes: ClassVar[tuple[str, ...]] = ()
    off_at_zero: ClassVar[bool] = True
    native_kinds: ClassVar[tuple[DropoutKind, ...]] = ()
    raises_variance: ClassVar[bool] = False
    separable: ClassVar[Separable] = "nothing"

    def __init_subclass__(cls, keys: Sequence[str] = (), on: On | None = None, **more: Any) -> None:
        if "in_eval" in cls.__dict__:
            cls.takes_in_eval = in_eval_arguments(cls)
        if "penalty" in cls.__dict__:
            cls.penalty_takes = penalty_arguments(cls)
        # The base class asks ``has_penalty``, which reads what was set above.
        super().__init_subclass__(keys, on, **more)
        for method, names in (("in_eval", cls.takes_in_eval), ("penalty", cls.penalty_takes)):
            if cls.takes and (missing := {"state", "units"}.intersection(names).difference(cls.takes)):
                raise RegularizerError(f"{cls.__name__}.{method} takes {min(missing)}, so __call__ must take it, too.")

    @classmethod
    def has_penalty(cls) -> bool:
        return bool(cls.penalty_takes)

    def __post_init__(self) -> None:
        # Before the checks of the base class, which look for ``"time"`` in the tuple.
        if "share_axes" in (field.name for field in fields(self)):
            object.__setattr__(self, "share_axes", share_axes(self))
        super().__post_init__()
        if self.penalty_takes:
            self.require(self.engine_options.reduction in ("mean", "sum"), "reduction", "'mean' or 'sum'")

    def why_not(self, site: Site) -> str:
        cure = f'Leave it out: {self.keys[0] if self.keys else "key"}={{("**#output", "!{site.name}"): strength}}.'
        return f"the value is a loss or another single number, and no prediction. {cure}" if site.loss else ""

    def unfit(self, shape: Sequence[int]) -> str:
        """Return why the formula cannot take a value of this shape, and what to do about it; ``""`` if it can.

        graphreg calls this method with each shape that the plan knows, and again with the value's
        shape at each call where the splice acts. If the result is not ``""``, graphreg raises
        RegularizerError with this text.
        """
        return ""

    def require_fit(self, shape: Sequence[int], who: str) -> None:
        """Raise RegularizerError if ``unfit`` returns a reason for this shape. ``who``: the splice and its site, for the message."""
        if reason := self.unfit(shape):
            raise RegularizerError(f"{who}: the value has shape {tuple(shape)}; {reason}")

    def in_a_row(self, weights: Sequence[float]) -> str:
        """Describe, for a warning, the joint effect of several splices of this class that act on one value, one after another.

        ``weights``: their strengths. Return ``""`` if the effect is harmless.
        """
        return ""


class Penalty(Regularizer):
    """A regularizer that measures values or parameters: ``__call__`` returns the measurement, a 0-d tensor.

    graphreg averages the measurements of all sites. A subclass may have an option ``reduction``,
    ``"mean"`` or ``"sum"``, which says whether they are averaged or added.

    Attributes:
        clean: Whether to measure the value that the model computed, before the splices at the same
            site act on it.
        value_range: The least and the greatest number that a measured value may have; None for any
            numbers. graphreg checks the value at each call; in compiled code, an assertion in the
            graph checks it.
    """

    _: KW_ONLY
    clean: bool = False

    value_range: ClassVar[tuple[float, float] | None] = None

    def check(self) -> None:
        """Raise RegularizerError for an option out of range, and for ``clean=True`` on parameters, which are always measured clean."""
        super().check()
        self.require(isinstance(self.clean, bool), "clean", "True or False")
        self.require(not (self.clean and self.on == "parameters"), "clean", "False, because penalties measure parameters as they are")
        self.require(self.engine_options.reduction in ("mean", "sum"), "reduction", "'mean' or 'sum'")
        if self.engine_options.by != "gradient":
            self.require(self.by_prox, "by", "'gradient' or 'prox'")
            able = type(self).prox is not Penalty.prox and self.on == "parameters" and "w" in self.takes
            self.require(able, "by", "'gradient': the class has no method prox, or its formula does not take one parameter w at a time")

    def prox(self, w: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the proximal map of ``step`` times the formula: the v that minimizes ``step * self(v) + ((v - w) ** 2).sum() / 2``.

        A class must have this method if it has the option ``by``. The method returns a new tensor.

        Args:
            w: A parameter, float32 or float64.
            step: 0 or more, 0-d, in the dtype of ``w``: the learning rate times the strength, divided by the number of sites if the
                penalty is a mean over them. At 0, the result is ``w``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method prox: write its proximal map there.")

    def slope(self, elements: int) -> float | None:
        """Return how strongly the formula pulls an element that equals 1, in a parameter with this number of elements; None if unknown.

        For example, the mean of the squares has the slope ``2 / elements``. For a penalty on values,
        ``elements`` is 1, and the slope is the derivative with respect to a number that all elements
        of the value have.

        A plan and the report use the slope to say when a penalty's strength is practically off.
        """
        return None

    def caution(self, sites: Sequence[Site], of: int) -> str:
        """Return a warning for the plan, the report and the log, such as that the strength is weaker than it looks; ``""`` for none.

        ``sites``: where the penalty measures. ``of``: the number of sites in the whole model over
        which the penalty averages. In a stage of a pipeline, this is more than ``sites`` has.
        """
        return ""

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that the base class returns, without the outputs of normalizations, whose scale is fixed."""
        return [site for site in super().defaults(sites) if self.on == "parameters" or not site.norm]
