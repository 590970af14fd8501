"""The judgement on what a pickle imports: what may never be imported, what is known, and what the trial run must show.

A list of names cannot prove that a pickle is harmless, and does not try to: what passes is loaded in the cage only. It refuses what no
model has a reason to import, before anything is built or run, and says which name it was, unless the uploader consents to such code.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.validation import Finding
from services.validator.pickle_stream import Global, PickleFacts
from services.validator.rules import rejection, warning


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAFE_BUILTINS = _words(
    """
    object type int float bool complex str bytes bytearray list tuple dict set frozenset slice range Ellipsis NotImplemented
    len min max sum abs round sorted zip reversed enumerate any all divmod pow repr hash ord chr property staticmethod classmethod
    Exception ValueError TypeError KeyError IndexError RuntimeError ArithmeticError ZeroDivisionError OverflowError Warning UserWarning
    DeprecationWarning FutureWarning RuntimeWarning
    """
)

FORBIDDEN_ROOTS = _words(
    """
    os posix nt posixpath ntpath sys subprocess _posixsubprocess pty socket _socket ssl select selectors socketserver http urllib ftplib
    smtplib poplib imaplib telnetlib xmlrpc asyncio multiprocessing _multiprocessing threading _thread concurrent ctypes _ctypes cffi
    importlib imp _imp runpy code codeop marshal pickle _pickle cPickle dill cloudpickle shelve dbm sqlite3 shutil tempfile glob fileinput
    webbrowser pdb bdb trace timeit cProfile profile pstats pydoc doctest unittest distutils setuptools pkg_resources pip venv ensurepip
    zipimport pkgutil site sysconfig signal resource gc inspect ast dis tokenize linecache traceback faulthandler atexit io _io mmap
    zipfile tarfile lib2to3 idlelib tkinter turtle readline rlcompleter cmd platform getpass pwd grp fcntl termios requests httpx aiohttp
    paramiko fabric pexpect sh torch.hub IPython nbformat
    """
)
"""Packages and modules that reach the machine, run text as a program, or load other pickles."""

FORBIDDEN_PATHS = (
    "_codecs.lookup",
    "codecs",
    "functools.reduce",
    "joblib.dump",
    "joblib.load",
    "joblib.memory",
    "joblib.externals",
    "joblib.parallel",
    "joblib._parallel_backends",
    "joblib.executor",
    "joblib.pool",
    "logging.config",
    "logging.FileHandler",
    "logging.handlers",
    "numpy.ctypeslib",
    "numpy.distutils",
    "numpy.f2py",
    "numpy.fromfile",
    "numpy.genfromtxt",
    "numpy.lib.npyio",
    "numpy.lib._npyio_impl",
    "numpy.load",
    "numpy.loadtxt",
    "numpy.save",
    "numpy.savetxt",
    "numpy.testing",
    "operator.attrgetter",
    "operator.methodcaller",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "pandas.eval",
    "pandas.io",
    "pandas.compat.pickle_compat",
    "pandas.core.computation",
    "pandas.read_",
    "scipy.io",
    "sklearn.datasets",
    "sklearn.utils._testing",
    "sklearn.utils._joblib",
    "types.CodeType",
    "types.FunctionType",
    "types.MethodType",
    "types.LambdaType",
)
"""Parts of otherwise good packages that reach files, the network or an interpreter. A prefix ends at a dot, or is the whole name."""

FORBIDDEN_MODULE_NAMES = _words(
    """
    os posix nt sys subprocess builtins importlib socket ctypes pickle cloudpickle marshal shutil runpy multiprocessing pty
    """
)
"""Modules that libraries import for themselves, also under a private name: ``joblib.parallel`` has an ``os`` and ``argparse`` a ``_sys``,
so the names ``os.system`` and ``_sys.exit`` in them must not pass."""

FORBIDDEN_NAMES = _words(
    """
    eval exec execfile compile system popen Popen check_output check_call spawn spawnl spawnv execv execve __import__ import_module
    getattr setattr delattr globals locals vars open input breakpoint run_module run_path loads runstring exec_command
    __builtins__ __globals__ __subclasses__ __getattribute__ __class__ __bases__ __mro__ __code__ __dict__ __reduce__ __reduce_ex__
    __loader__ __spec__
    """
)
"""Names that no model imports from anywhere."""

CARRIERS = ("cloudpickle", "dill")
"""Packages that save classes and functions by value."""

STANDARD_ROOTS = _words(
    """
    builtins __builtin__ copyreg copy_reg collections datetime decimal fractions math cmath numbers statistics random itertools
    functools operator _operator enum re uuid array bisect heapq string types typing dataclasses copy weakref abc _codecs _collections
    zoneinfo pathlib time calendar hashlib logging warnings textwrap unicodedata contextlib
    """
)


@dataclass(frozen=True, slots=True)
class Consent:
    """Whether a pickle may carry code, or call more than is known to be needed.

    Attributes
    ----------
    given
        The uploader consents.
    permitted
        Consent counts on this platform.
    """

    given: bool = False
    permitted: bool = True

    @property
    def holds(self) -> bool:
        return self.given and self.permitted

    @property
    def remedy(self) -> str:
        """How what is refused may pass, as the end of a sentence."""
        if not self.permitted:
            return "this platform does not accept code in models (VALIDATOR_ALLOW_CODE)"
        return "if that is meant, upload it with --allow-code"


def judge(
    facts: PickleFacts,
    known_roots: frozenset[str],
    consent: Consent = Consent(),
    *,
    may_be_provided: bool = True,
) -> tuple[Finding, ...]:
    """Return what there is to say of a pickle.

    Parameters
    ----------
    known_roots
        Top-level modules that some requirement provides, or that came with the artifact.
    may_be_provided
        There are requirements whose modules may have other names; without them, an unknown module will be missing.
    consent
        With it, what would be refused for the code that runs is a warning. Names that are in no file stay refused.
    """
    forbidden = {name: position for name, position in facts.globals.items() if name.module != "__main__" and is_forbidden(name)}
    findings = [_of_the_script(name, position, consent) for name, position in facts.globals.items() if name.module == "__main__"]
    if consent.holds:
        findings += _consented(facts, forbidden)
    else:
        findings += _refused(facts, forbidden, consent)
    findings += _references(facts)
    unknown = sorted(facts.roots - known_roots - STANDARD_ROOTS - sys.stdlib_module_names - FORBIDDEN_ROOTS - {"__main__"})
    findings += [_unknown(facts, root, may_be_provided, consent) for root in unknown]
    if facts.has_trailing_bytes:
        findings.append(warning("pickle.trailing_bytes", "bytes follow the end of the pickle; they are not read"))
    return tuple(findings)


def _unknown(facts: PickleFacts, root: str, may_be_provided: bool, consent: Consent) -> Finding:
    if may_be_provided:
        message = f"the artifact imports '{root}', which no known package provides; name it in the requirements"
        return warning("pickle.unknown_module", message, module=root)
    named = next((f"{name.module}.{name.name}" for name in facts.globals if name.module.partition(".")[0] == root), root)
    code = f"upload it with --code and the file or folder that has '{root}'; " if consent.permitted else ""
    message = (
        f"the artifact needs '{named}', and no known package provides '{root}'; if it is your own module, {code or 'put it in a package; '}"
        "if it is a package's, name the package with --requirements"
    )
    return rejection("pickle.unknown_module", message, module=root)


def _references(facts: PickleFacts) -> list[Finding]:
    findings = []
    if facts.extension_codes:
        message = "the artifact imports names by number (extension codes), which only the process that wrote it can read"
        findings.append(rejection("pickle.extension_code", message, positions=facts.extension_codes[:10]))
    if facts.persistent_ids:
        message = "the artifact refers to objects outside of its file (persistent ids), which cannot be loaded"
        findings.append(rejection("pickle.persistent_id", message, positions=facts.persistent_ids[:10]))
    return findings


def _of_the_script(name: Global, position: int, consent: Consent) -> Finding:
    remedy = "put it in a package"
    if consent.permitted:
        remedy = (
            f"move '{name.name}' to a module, say helpers.py, save the model again and upload it with --code helpers.py, "
            "or save it with cloudpickle and upload it with --allow-code"
        )
    message = f"the artifact needs '{name.name}' from the script it was made by (__main__), which is not in the file; {remedy}"
    return rejection("pickle.training_script", message, module=name.module, name=name.name, position=position)


def _refused(facts: PickleFacts, forbidden: Mapping[Global, int], consent: Consent) -> list[Finding]:
    findings = []
    carrying = [name for name in forbidden if name.module.partition(".")[0] in CARRIERS]
    if carrying:
        message = f"the artifact carries code of its own ({_carried(facts, carrying)}), which would run when it is loaded; {consent.remedy}"
        evidence = {"module": carrying[0].module, "name": carrying[0].name, "position": forbidden[carrying[0]]}
        findings.append(rejection("pickle.forbidden_global", message, carried=sorted(facts.carried)[:10], **evidence))
    for name, position in forbidden.items():
        if name in carrying:
            continue
        if name.name == "getattr" and facts.attributes:
            called = ", ".join(f"'{attribute}'" for attribute in sorted(facts.attributes)[:3])
            what = f"takes {called} by builtins.getattr when it is loaded, which could as well be any other method"
        else:
            what = f"imports '{name.module}.{name.name}' when it is loaded, which no model needs"
        evidence = {"module": name.module, "name": name.name, "position": position}
        findings.append(rejection("pickle.forbidden_global", f"the artifact {what}; {consent.remedy}", **evidence))
    if facts.computed_globals:
        message = "the artifact imports names that it computes while it is loaded, so that nobody can tell what they are"
        findings.append(rejection("pickle.computed_global", f"{message}; {consent.remedy}", positions=facts.computed_globals[:10]))
    return findings


def _consented(facts: PickleFacts, forbidden: Mapping[Global, int]) -> list[Finding]:
    if not forbidden and not facts.computed_globals:
        return []
    names = sorted(f"{name.module}.{name.name}" for name in forbidden)
    shown = [f"'{name}'" for name in names[:3]] + (["names that it computes"] if facts.computed_globals else [])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    message = f"the artifact runs code that is not checked when it is loaded ({', '.join(shown)}{more}); its uploader consents to that"
    return [warning("pickle.consented_code", message, names=names[:10], carried=sorted(facts.carried)[:10])]


def _carried(facts: PickleFacts, carrying: Sequence[Global]) -> str:
    saver = carrying[0].module.partition(".")[0]
    if not facts.carried:
        return f"saved by {saver}"
    names = sorted("a lambda" if name == "<lambda>" else f"'{name}'" for name in facts.carried)
    return f"{', '.join(names[:3])}, saved by {saver}"


def is_forbidden(name: Global) -> bool:
    """Tell whether importing this name is refused.

    Examples
    --------
    >>> is_forbidden(Global("posix", "system")), is_forbidden(Global("joblib.parallel", "os.system"))
    (True, True)
    >>> is_forbidden(Global("sklearn.linear_model._logistic", "LogisticRegression"))
    False
    """
    module_parts, name_parts = name.module.split("."), name.name.split(".")
    if module_parts[0] in FORBIDDEN_ROOTS:
        return True
    if module_parts[0] in ("builtins", "__builtin__"):
        return name.name not in SAFE_BUILTINS
    if any(part in FORBIDDEN_NAMES for part in name_parts):
        return True
    if any(part.lstrip("_") in FORBIDDEN_MODULE_NAMES for part in name_parts):
        return True
    full = f"{name.module}.{name.name}"
    return any(full == path or full.startswith(path if path.endswith("_") else f"{path}.") for path in FORBIDDEN_PATHS)
