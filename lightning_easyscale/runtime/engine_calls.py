"""What autograd's engine calls in Python, apart from the runtime's own hooks: noticed before it runs.

The engine is C++; Python enters a backward where C++ calls it, with the frame that called the engine below it. Until
Python 3.11 a profile function of the thread sees that. From 3.12 on (PEP 669) to set one changes the code of the whole
process each time, and slows all of it down meanwhile; there one monitor for all threads stays, and each function that
somebody else calls is let go of for good when it first runs. So there a function that ran elsewhere before is not
noticed when the engine calls it; one that only the engine calls, as hooks and `autograd.Function`s are, always is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
# Hooks of the runtime need no process-wide state. A collective, which the engine also finds here, does.
_OURS = (f"{_PACKAGE}.reduction.", f"{_PACKAGE}.runtime.overlap")

Found = Callable[[str], None]


def _name_of(frame: FrameType) -> str | None:
    """Of a function that is not ours."""
    module = str(frame.f_globals.get("__name__"))
    return None if module.startswith(_OURS) else f"{module}.{frame.f_code.co_name}"


class EngineCalls:
    """Listens, in the thread that calls `begin`, for Python that the engine calls.

    Args:
        found: called once with its name before it runs; what it raises is raised in the engine.
    """

    def __init__(self, found: Found) -> None:
        self._found = found
        self._engine: FrameType | None = None

    def begin(self, engine: FrameType) -> bool:
        """Listen, given the frame that called the engine.

        Returns:
            Whether that is possible: somebody else may have a profile function, or all the monitors.
        """
        if sys.version_info >= (3, 12):
            return _monitor.listen(engine.f_code, self._call)
        if sys.getprofile() is not None:
            return False
        self._engine = engine
        sys.setprofile(self._profile)
        return True

    def end(self) -> None:
        """Listen no more."""
        if sys.version_info >= (3, 12):
            _monitor.forget()
        elif self._engine is not None:
            sys.setprofile(None)
            self._engine = None

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_back is self._engine:
            self._call(frame)

    def _call(self, frame: FrameType) -> None:
        if (name := _name_of(frame)) is not None:
            self.end()
            self._found(name)


if sys.version_info >= (3, 12):

    class _Monitor:
        """Sees which Python functions start, in all threads."""

        _TOOLS = (4, 3)  # the others have names in the standard library, as those of debuggers

        def __init__(self) -> None:
            self._tool: int | None = None
            self._engines: set[CodeType] = set()
            self._listeners: dict[int, Callable[[FrameType], None]] = {}

        def listen(self, engine: CodeType, listener: Callable[[FrameType], None]) -> bool:
            """Tell `listener` of what the engine calls in this thread."""
            self._engines.add(engine)
            if self._tool is None and not self._start():
                return False
            self._listeners[threading.get_ident()] = listener
            return True

        def forget(self) -> None:
            """Of this thread."""
            self._listeners.pop(threading.get_ident(), None)

        def _start(self) -> bool:
            free = [tool for tool in self._TOOLS if sys.monitoring.get_tool(tool) is None]
            if not free:
                return False
            self._tool = free[0]
            sys.monitoring.use_tool_id(self._tool, _PACKAGE)
            sys.monitoring.register_callback(self._tool, sys.monitoring.events.PY_START, self._started)
            sys.monitoring.set_events(self._tool, sys.monitoring.events.PY_START)
            return True

        def _started(self, code: CodeType, offset: int) -> Any:
            frame = sys._getframe(1)
            if frame.f_back is None or frame.f_back.f_code not in self._engines:
                return sys.monitoring.DISABLE
            if (listener := self._listeners.get(threading.get_ident())) is not None:
                listener(frame)
            return None

    _monitor = _Monitor()
