"""What a pickle would import and call, found by running its opcodes on stand-ins.

A pickle is a program for a small stack machine. This one runs it without importing or calling anything: a global becomes its name, a
call becomes a note of what was called with what. That finds names that a search for strings misses (kept in the memo, computed,
nested), and it can follow files of joblib, in which the raw bytes of an array follow the opcodes that describe it.

References
----------
CPython ``Lib/pickletools.py`` (the opcodes), ``Lib/pickle.py`` (the machine); joblib ``numpy_pickle.py`` (``NumpyArrayWrapper``).
"""

import _compat_pickle
import math
import pickletools
from dataclasses import dataclass, field
from typing import Any

from services.validator.content import ContentReader
from services.validator.errors import BrokenPickleError, LongPickleError

MAX_OPCODES = 30_000_000
"""About half a minute of reading; a vocabulary of a million words takes three million."""

MAX_NESTING = 16
"""Object arrays in object arrays; real models have one or two levels."""

_FIRST_PROTOCOL_OF_PYTHON_3 = 3

_KEPT_ITEMS = 64
"""Items of a container that are remembered: a wrapper's state has six."""

_LONG_ARGUMENT_BYTES = 1 << 20
_LENGTH_BYTES = {"BINBYTES": 4, "BINUNICODE": 4, "BINSTRING": 4, "LONG4": 4, "BINBYTES8": 8, "BINUNICODE8": 8, "BYTEARRAY8": 8}

_WRAPPER = ("joblib.numpy_pickle", "NumpyArrayWrapper")
_VERSION_KEY = "_sklearn_version"

_CARRYING = ("_make_skeleton_class", "_make_skeleton_enum")
"""Functions of cloudpickle whose first text is the name of the class that is in the file."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle imports."""

    module: str
    name: str


@dataclass(slots=True)
class Made:
    """What a call would have returned."""

    callable: Any
    arguments: Any
    state: Any = None


@dataclass(slots=True)
class PickleFacts:
    """What a pickle does when it is loaded.

    Attributes
    ----------
    globals
        What it imports -> position of the first time, in bytes.
    computed_globals, extension_codes, persistent_ids
        Positions of imports whose names are not in the file, and of references out of it.
    sklearn_versions
        Versions of scikit-learn that its estimators say they were saved with.
    has_feature_names
        An estimator was fitted on named columns.
    sets_output
        An estimator says in which form its transformers answer (``set_output``).
    uses_joblib
        Arrays are stored the way joblib does.
    has_trailing_bytes
        Something follows the end.
    carried
        Classes and functions whose code is in the file (saved by value by cloudpickle), as far as their names are told.
    attributes
        What ``getattr`` is called for, such as ``str.split``.
    submodules
        Modules that carried code imports for itself.
    """

    globals: dict[Global, int] = field(default_factory=dict)
    computed_globals: list[int] = field(default_factory=list)
    extension_codes: list[int] = field(default_factory=list)
    persistent_ids: list[int] = field(default_factory=list)
    sklearn_versions: set[str] = field(default_factory=set)
    has_feature_names: bool = False
    sets_output: bool = False
    uses_joblib: bool = False
    has_trailing_bytes: bool = False
    carried: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    submodules: set[str] = field(default_factory=set)

    @property
    def roots(self) -> frozenset[str]:
        """Top-level packages of everything imported."""
        return frozenset(module.partition(".")[0] for module in (*(name.module for name in self.globals), *self.submodules))


def read_pickle(reader: ContentReader) -> PickleFacts:
    """Follow a pickle to its end.

    Raises
    ------
    BrokenPickleError
        It is not a pickle, or ends too early.
    LongPickleError
        It has more opcodes than are looked at.
    """
    facts = PickleFacts()
    _Machine(reader, facts, depth=0, budget=[MAX_OPCODES]).run()
    facts.has_trailing_bytes = bool(reader.read(1))
    return facts


class _Unknown:
    """A value that does not matter here."""

    def __repr__(self) -> str:
        return "UNKNOWN"


_UNKNOWN = _Unknown()
_MARK = object()


class _Machine:
    """One run, from the first opcode to STOP; an object array inside is another run on the same reader."""

    def __init__(self, reader: ContentReader, facts: PickleFacts, depth: int, budget: list[int]) -> None:
        self._reader = reader
        self._facts = facts
        self._depth = depth
        self._budget = budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._position = 0
        self._protocol = 0
        self._handlers = {ord(opcode.code): (opcode, getattr(self, f"_on_{opcode.name.lower()}", None)) for opcode in pickletools.opcodes}

    def run(self) -> None:
        try:
            while self._step():
                pass
        except (IndexError, KeyError) as error:
            raise BrokenPickleError(f"is not one: the opcode at byte {self._position} takes something that is not there") from error
        except ValueError as error:
            if isinstance(error, UnicodeDecodeError):
                raise BrokenPickleError(f"has a text at byte {self._position} that is not UTF-8") from error
            raise BrokenPickleError(self._ended_early(str(error))) from error

    def _step(self) -> bool:
        self._position = self._reader.tell()
        code = self._reader.read(1)
        if not code:
            raise BrokenPickleError(f"ends too early, at byte {self._position}: the file is truncated")
        opcode, handler = self._handlers.get(code[0], (None, None))
        if opcode is None:
            raise BrokenPickleError(f"has no opcode at byte {self._position}")
        self._budget[0] -= 1
        if self._budget[0] < 0:
            raise LongPickleError(f"has more than {MAX_OPCODES} opcodes, which are not all looked at")
        argument = self._argument(opcode)
        if opcode.name == "STOP":
            return False
        if handler is None:
            self._stack.append(argument if opcode.arg is not None else _UNKNOWN)
        else:
            handler(argument)
        return True

    def _ended_early(self, reason: str) -> str:
        if self._reader.read(1):
            return f"has an opcode at byte {self._position} that cannot be read ({reason})"
        return f"ends too early, in the opcode at byte {self._position}: the file is truncated"

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        width = _LENGTH_BYTES.get(opcode.name)
        if width is None:
            return None if opcode.arg is None else opcode.arg.reader(self._reader)  # type: ignore[arg-type]
        raw = self._reader.read(width)
        size = int.from_bytes(raw, "little")
        if len(raw) < width:
            raise ValueError("no length")
        if size > _LONG_ARGUMENT_BYTES:
            if not self._reader.skip(size):
                raise ValueError("fewer bytes than announced")
            return _UNKNOWN
        data = self._reader.read(size)
        if len(data) < size:
            raise ValueError("fewer bytes than announced")
        return data.decode("utf-8", "surrogatepass") if "UNICODE" in opcode.name else _UNKNOWN

    def _pop_mark(self) -> list[Any]:
        """Take what lies above the last mark, and the mark."""
        items: list[Any] = []
        while True:
            item = self._stack.pop()
            if item is _MARK:
                break
            items.append(item)
        items.reverse()
        return items

    # Opcodes that push what they build -------------------------------------------------------------------------------

    def _on_none(self, _: Any) -> None:
        self._stack.append(None)

    def _on_newtrue(self, _: Any) -> None:
        self._stack.append(True)

    def _on_newfalse(self, _: Any) -> None:
        self._stack.append(False)

    def _on_mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _on_empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def _on_empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _on_empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _on_empty_set(self, _: Any) -> None:
        self._stack.append([])

    def _on_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _on_tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _on_tuple2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _on_tuple3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _on_list(self, _: Any) -> None:
        self._stack.append(self._pop_mark()[:_KEPT_ITEMS])

    def _on_frozenset(self, _: Any) -> None:
        self._stack.append(self._pop_mark()[:_KEPT_ITEMS])

    def _on_dict(self, _: Any) -> None:
        items = self._pop_mark()
        made: dict[str, Any] = {}
        self._put_items(made, items)
        self._stack.append(made)

    # Opcodes that change what is there -------------------------------------------------------------------------------

    def _on_append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _on_appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _on_additems(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list) and len(target) < _KEPT_ITEMS:
            target.extend(items[: _KEPT_ITEMS - len(target)])

    def _on_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._put_items(self._stack[-1], [key, value])

    def _on_setitems(self, _: Any) -> None:
        items = self._pop_mark()
        self._put_items(self._stack[-1], items)

    def _put_items(self, target: Any, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=False):
            if key == _VERSION_KEY and isinstance(value, str):
                self._facts.sklearn_versions.add(value)
            elif key == "feature_names_in_":
                self._facts.has_feature_names = True
            elif key == "_sklearn_output_config":
                self._facts.sets_output = True
            if isinstance(target, dict) and isinstance(key, str) and len(target) < _KEPT_ITEMS:
                target[key] = value

    def _on_pop(self, _: Any) -> None:
        self._stack.pop()

    def _on_pop_mark(self, _: Any) -> None:
        self._pop_mark()

    def _on_dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _on_proto(self, version: int) -> None:
        self._protocol = version

    def _on_frame(self, _: Any) -> None:
        pass

    _on_readonly_buffer = _on_frame

    # The memo --------------------------------------------------------------------------------------------------------

    def _on_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _on_put(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    def _on_get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    _on_binput = _on_long_binput = _on_put
    _on_binget = _on_long_binget = _on_get

    # Opcodes that import and call ------------------------------------------------------------------------------------

    def _on_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._import(module, name)

    def _on_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._import(module, name)

    def _import(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self._facts.computed_globals.append(self._position)
            self._stack.append(_UNKNOWN)
            return
        if self._protocol < _FIRST_PROTOCOL_OF_PYTHON_3:
            # The unpickler translates Python 2's names: "commands" is "subprocess" to it.
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name))
        imported = Global(module, name)
        self._facts.globals.setdefault(imported, self._position)
        self._stack.append(imported)

    def _on_reduce(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._note_call(called, arguments)
        self._stack.append(Made(called, arguments))

    def _note_call(self, called: Any, arguments: Any) -> None:
        """Remember the names of what a call makes, for a message that says more than the name of the function called."""
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            return
        texts = [text for text in arguments if isinstance(text, str)]
        if called.module in ("builtins", "__builtin__") and called.name == "getattr" and len(arguments) == 2 and len(texts) == 1:
            owner = arguments[0]
            self._keep(self._facts.attributes, f"{owner.name}.{texts[0]}" if isinstance(owner, Global) else texts[0])
        elif called.module.partition(".")[0] == "cloudpickle":
            if called.name == "subimport":
                self._facts.submodules.update(texts[:1])
            elif called.name in _CARRYING and texts:
                self._keep(self._facts.carried, texts[0])
            elif called.name == "_function_setstate" and (name := _function_name(arguments)):
                self._keep(self._facts.carried, name)

    def _keep(self, names: set[str], name: str) -> None:
        if len(names) < _KEPT_ITEMS:
            names.add(name)

    _on_newobj = _on_reduce

    def _on_newobj_ex(self, _: Any) -> None:
        self._stack.pop()
        self._on_reduce(None)

    def _on_inst(self, argument: str) -> None:
        arguments = tuple(self._pop_mark())
        self._on_global(argument)
        self._stack.append(Made(self._stack.pop(), arguments))

    def _on_obj(self, _: Any) -> None:
        called, *arguments = self._pop_mark()
        self._stack.append(Made(called, tuple(arguments)))

    def _on_ext1(self, _: Any) -> None:
        self._facts.extension_codes.append(self._position)
        self._stack.append(_UNKNOWN)

    _on_ext2 = _on_ext4 = _on_ext1

    def _on_persid(self, _: Any) -> None:
        self._facts.persistent_ids.append(self._position)
        self._stack.append(_UNKNOWN)

    def _on_binpersid(self, _: Any) -> None:
        self._stack.pop()
        self._on_persid(None)

    def _on_build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict | None):
            state = {**(state[0] or {}), **(state[1] if isinstance(state[1], dict) else {})}
        if not isinstance(target, Made):
            return
        target.state = state
        if _is_wrapper(target):
            self._facts.uses_joblib = True
            self._pass_array(state)
            self._stack[-1] = _UNKNOWN

    # Arrays of joblib ------------------------------------------------------------------------------------------------

    def _pass_array(self, state: Any) -> None:
        """Go on after the array whose description was just read."""
        if not isinstance(state, dict):
            raise BrokenPickleError(f"has an array at byte {self._position} without a description")
        size = _element_bytes(state.get("dtype"))
        if size is None:
            raise BrokenPickleError(f"has an array at byte {self._position} whose element type cannot be told")
        if size == 0:
            self._pass_object_array()
            return
        shape = state.get("shape")
        if not isinstance(shape, tuple):
            raise BrokenPickleError(f"has an array at byte {self._position} without a shape")
        sizes = [_integer(dimension) for dimension in shape]
        if None in sizes:
            raise BrokenPickleError(f"has an array at byte {self._position} whose shape cannot be told")
        if state.get("numpy_array_alignment_bytes") is not None:
            padding = self._reader.read(1)
            self._reader.skip(padding[0] if padding else 0)
        if not self._reader.skip(math.prod(dimension for dimension in sizes if dimension is not None) * size):
            raise BrokenPickleError(f"ends too early, in an array at byte {self._position}: the file is truncated")

    def _pass_object_array(self) -> None:
        if self._depth >= MAX_NESTING:
            raise BrokenPickleError(f"nests object arrays more than {MAX_NESTING} deep")
        _Machine(self._reader, self._facts, self._depth + 1, self._budget).run()


def _function_name(arguments: tuple[Any, ...]) -> str | None:
    """Name of a function whose state cloudpickle sets; ``None`` for a method, whose class is named."""
    state = arguments[1] if len(arguments) > 1 else None
    slots = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    name = slots.get("__qualname__") if isinstance(slots, dict) else None
    if not isinstance(name, str):
        return None
    name = name.rpartition("<locals>.")[2]
    return None if "." in name else name


def _is_wrapper(made: Made) -> bool:
    """Tell whether joblib would read an array after this object; protocols 0 and 1 make it through ``copyreg``."""
    made_of = made.callable
    if isinstance(made_of, Global) and made_of.name == "_reconstructor" and isinstance(made.arguments, tuple) and made.arguments:
        made_of = made.arguments[0]
    return isinstance(made_of, Global) and made_of.name == _WRAPPER[1] and made_of.module.endswith(_WRAPPER[0])


def _integer(value: Any) -> int | None:
    """Return a dimension: a plain integer, or a NumPy scalar, whose value is out of sight."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _element_bytes(dtype: Any) -> int | None:
    """Return the size of an array's elements: 0 for objects, ``None`` when it cannot be told.

    ``dtype`` is ``numpy.dtype(code, False, True)`` with a state ``(version, order, subdtype, names, fields, size, …)``; the size in the
    state counts for text, bytes and records only; the code of the others tells theirs.
    """
    if not isinstance(dtype, Made) or not isinstance(dtype.arguments, tuple) or not dtype.arguments:
        return None
    code, state = dtype.arguments[0], dtype.state
    if not isinstance(code, str) or not code:
        return None
    if code[0] == "O" or _has_objects(state):
        return 0
    size = state[5] if code[0] in "USV" and isinstance(state, tuple) and len(state) > 5 else -1
    if isinstance(size, int) and size > 0:
        return size
    return int(code[1:]) if code[1:].isdecimal() and int(code[1:]) > 0 else None


def _has_objects(state: Any) -> bool:
    """Tell whether a record type has a field of objects."""
    fields = state[4] if isinstance(state, tuple) and len(state) > 4 else None
    if not isinstance(fields, dict):
        return False
    return any(isinstance(value, tuple) and value and _element_bytes(value[0]) == 0 for value in fields.values())
