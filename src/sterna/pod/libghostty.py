"""The terminal model of Ghostty (libghostty-vt) through ctypes: only the functions used here, loaded on first use.

The library comes with the package pyghostty, whose own Python layer is not imported: parsing its C declarations costs
110 ms and 9 MiB. What the structures must look like is checked against the library's own description of its types.
Sources: libghostty-vt's headers vt/terminal.h, vt/formatter.h, vt/render.h, vt/snapshot.h, vt/screen.h.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

from sterna.errors import SternaError

# GhosttyTerminalOption
OPT_WRITE_PTY = 1
OPT_BELL = 2
OPT_XTVERSION = 4
OPT_SIZE = 6
OPT_KITTY_IMAGE_STORAGE_LIMIT = 15
OPT_APC_MAX_BYTES = 19
OPT_DEFAULT_CURSOR_STYLE = 22
OPT_SCROLLBACK_MAX_BYTES = 27
OPT_SCROLLBACK_MAX_LINES = 28
OPT_CONTINUATION_MAX_BYTES = 31
# GhosttyTerminalData
DATA_COLS = 1
DATA_ROWS = 2
DATA_CURSOR_X = 3
DATA_CURSOR_Y = 4
DATA_CURSOR_PENDING_WRAP = 5
DATA_ACTIVE_SCREEN = 6
DATA_KITTY_KEYBOARD_FLAGS = 8
DATA_TITLE = 12
DATA_PWD = 13
DATA_SCROLLBACK_ROWS = 15
DATA_COLOR_FOREGROUND = 18
DATA_COLOR_BACKGROUND = 19
DATA_COLOR_CURSOR = 20
DATA_COLOR_PALETTE = 21
DATA_COLOR_PALETTE_DEFAULT = 25
DATA_MODE = 37
DATA_VT_GROUND = 38
# GhosttyRenderState…
RENDER_ROW_ITERATOR = 4
RENDER_CURSOR = 18
RENDER_OPTION_OVERSCAN = 1
ROW_RAW = 2
ROW_CELLS = 3
ROW_CELLS_RAW = 5
CELLS_STYLE = 2
CELLS_GRAPHEMES_UTF8 = 9
# GhosttyRowData
ROW_DATA_WRAP = 1
POINT_SCREEN = 2
FORMAT_VT = 1
SUCCESS = 0
OUT_OF_SPACE = -3

Pointer = ctypes.c_void_p


class String(ctypes.Structure):
    """GhosttyString: bytes that belong to the library."""

    _fields_ = (("ptr", ctypes.c_void_p), ("len", ctypes.c_size_t))

    def value(self) -> bytes:
        """Returns a copy of the bytes."""
        return ctypes.string_at(self.ptr, self.len) if self.ptr and self.len else b""


class Buffer(ctypes.Structure):
    """GhosttyBuffer: room for the library to write into."""

    _fields_ = (("ptr", ctypes.c_void_p), ("cap", ctypes.c_size_t), ("len", ctypes.c_size_t))


class CellsView(ctypes.Structure):
    """GhosttyCellsView: a row's cells as the library keeps them."""

    _fields_ = (("ptr", ctypes.c_void_p), ("len", ctypes.c_size_t))


class ModeConfig(ctypes.Structure):
    """GhosttyTerminalModeConfig."""

    _fields_ = (("mode", ctypes.c_uint16), ("value", ctypes.c_bool))


class StyleColor(ctypes.Structure):
    """GhosttyStyleColor with the padding its 8-byte aligned union asks for."""

    _fields_ = (("tag", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_uint8 * 8))


class Style(ctypes.Structure):
    """GhosttyStyle."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("fg", StyleColor),
        ("bg", StyleColor),
        ("underline_color", StyleColor),
        ("flags", ctypes.c_uint8 * 8),
        ("underline", ctypes.c_int),
    )


class CursorState(ctypes.Structure):
    """GhosttyRenderStateCursor."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("has_value", ctypes.c_bool),
        ("x", ctypes.c_uint16),
        ("y", ctypes.c_uint16),
        ("wide_tail", ctypes.c_bool),
        ("visible", ctypes.c_bool),
        ("blinking", ctypes.c_bool),
        ("password", ctypes.c_bool),
        ("shape", ctypes.c_int),
    )


class Overscan(ctypes.Structure):
    """GhosttyRenderStateOverscan: rows above and below the screen that a render state shows too."""

    _fields_ = (("above", ctypes.c_uint16), ("below", ctypes.c_uint16))


class Point(ctypes.Structure):
    """GhosttyPoint, its union written out, as unions cannot be passed by value."""

    _fields_ = (
        ("tag", ctypes.c_int),
        ("_pad", ctypes.c_int),
        ("x", ctypes.c_uint16),
        ("y", ctypes.c_uint32),
        ("_rest", ctypes.c_uint64),
    )


class GridRef(ctypes.Structure):
    """GhosttyGridRef."""

    _fields_ = (("size", ctypes.c_size_t), ("node", Pointer), ("x", ctypes.c_uint16), ("y", ctypes.c_uint16))


class Selection(ctypes.Structure):
    """GhosttySelection."""

    _fields_ = (("size", ctypes.c_size_t), ("start", GridRef), ("end", GridRef), ("rectangle", ctypes.c_bool))


class ScreenExtra(ctypes.Structure):
    """GhosttyFormatterScreenExtra."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("cursor", ctypes.c_bool),
        ("style", ctypes.c_bool),
        ("hyperlink", ctypes.c_bool),
        ("protection", ctypes.c_bool),
        ("kitty_keyboard", ctypes.c_bool),
        ("charsets", ctypes.c_bool),
    )


class TerminalExtra(ctypes.Structure):
    """GhosttyFormatterTerminalExtra."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("palette", ctypes.c_bool),
        ("modes", ctypes.c_bool),
        ("scrolling_region", ctypes.c_bool),
        ("tabstops", ctypes.c_bool),
        ("pwd", ctypes.c_bool),
        ("keyboard", ctypes.c_bool),
        ("screen", ScreenExtra),
    )


class FormatterOptions(ctypes.Structure):
    """GhosttyFormatterTerminalOptions."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("emit", ctypes.c_int),
        ("unwrap", ctypes.c_bool),
        ("trim", ctypes.c_bool),
        ("extra", TerminalExtra),
        ("selection", ctypes.POINTER(Selection)),
    )


class SizeReport(ctypes.Structure):
    """GhosttySizeReportSize: cells, then a cell's size in pixels."""

    _fields_ = (
        ("rows", ctypes.c_uint16),
        ("columns", ctypes.c_uint16),
        ("cell_width", ctypes.c_uint32),
        ("cell_height", ctypes.c_uint32),
    )


class EngineMissingError(SternaError):
    """The library is not there or is not the one this module knows."""


_LAYOUT: tuple[tuple[str, type[ctypes.Structure]], ...] = (
    ("GhosttyString", String),
    ("GhosttyBuffer", Buffer),
    ("GhosttyCellsView", CellsView),
    ("GhosttyTerminalModeConfig", ModeConfig),
    ("GhosttyStyle", Style),
    ("GhosttyRenderStateCursor", CursorState),
    ("GhosttyRenderStateOverscan", Overscan),
    ("GhosttyPoint", Point),
    ("GhosttyGridRef", GridRef),
    ("GhosttySelection", Selection),
    ("GhosttyFormatterTerminalOptions", FormatterOptions),
    ("GhosttySizeReportSize", SizeReport),
)
# Bits of GhosttyCell: (least significant bit, width), as screen_ghostty unpacks them.
_CELL_BITS = {
    "content_tag": (0, 2),
    "content": (2, 24),
    "style_id": (26, 16),
    "wide": (42, 2),
    "protected": (44, 1),
    "hyperlink": (45, 1),
}

_SIZE = ctypes.c_size_t
_INT = ctypes.c_int
_FUNCTIONS: dict[str, tuple[object, ...]] = {
    "terminal_new": (Pointer, Pointer, ctypes.c_uint16, ctypes.c_uint16),
    "terminal_free": (Pointer,),
    "terminal_resize": (Pointer, ctypes.c_uint16, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint32),
    "terminal_set": (Pointer, _INT, Pointer),
    "terminal_get": (Pointer, _INT, Pointer),
    "terminal_vt_write": (Pointer, ctypes.c_char_p, _SIZE),
    "terminal_continuation_buf": (Pointer, Pointer, _SIZE, Pointer),
    "terminal_grid_ref": (Pointer, Point, Pointer),
    "grid_ref_hyperlink_uri": (Pointer, Pointer, _SIZE, Pointer),
    "formatter_terminal_new": (Pointer, Pointer, Pointer, FormatterOptions),
    "formatter_format_buf": (Pointer, Pointer, _SIZE, Pointer),
    "formatter_free": (Pointer,),
    "render_state_new": (Pointer, Pointer),
    "render_state_free": (Pointer,),
    "render_state_update": (Pointer, Pointer),
    "render_state_get": (Pointer, _INT, Pointer),
    "render_state_set": (Pointer, _INT, Pointer),
    "render_state_row_iterator_new": (Pointer, Pointer),
    "render_state_row_iterator_free": (Pointer,),
    "render_state_row_iterator_next": (Pointer,),
    "render_state_row_get": (Pointer, _INT, Pointer),
    "render_state_row_cells_new": (Pointer, Pointer),
    "render_state_row_cells_free": (Pointer,),
    "render_state_row_cells_select": (Pointer, ctypes.c_uint16),
    "render_state_row_cells_get": (Pointer, _INT, Pointer),
    "row_get": (ctypes.c_uint64, _INT, Pointer),
    "snapshot_encode_buf": (Pointer, Pointer, _SIZE, Pointer),
    "snapshot_decoder_new_buf": (Pointer, Pointer, ctypes.c_char_p, _SIZE),
    "snapshot_decoder_set": (Pointer, _INT, Pointer),
    "snapshot_decoder_decode": (Pointer, Pointer),
    "snapshot_decoder_free": (Pointer,),
}
_VOID = {
    "terminal_free",
    "terminal_vt_write",
    "formatter_free",
    "render_state_free",
    "render_state_row_iterator_free",
    "render_state_row_cells_free",
    "snapshot_decoder_free",
}
_BOOL = {"render_state_row_iterator_next"}


class Library:
    """The loaded library: `lib.terminal_new(…)` is ghostty_terminal_new and so on."""

    def __init__(self, path: str) -> None:
        try:
            handle = ctypes.CDLL(path)
            for name, arguments in _FUNCTIONS.items():
                function = getattr(handle, f"ghostty_{name}")
                function.argtypes = arguments
                function.restype = None if name in _VOID else ctypes.c_bool if name in _BOOL else ctypes.c_int
                setattr(self, name, function)
            describe = handle.ghostty_type_json
            describe.restype = ctypes.c_char_p
            _check_layout(describe())
        except (OSError, AttributeError) as error:
            message = f"The terminal model {path} cannot be used ({error}): reinstall pyghostty."
            raise EngineMissingError(message) from error

    def __getattr__(self, name: str) -> ctypes._FuncPointer:  # only for type checkers: all names are set above
        raise AttributeError(name)


def _check_layout(description: bytes) -> None:
    """Raises EngineMissingError unless the library's types are the ones declared here."""
    import json

    types = json.loads(description)["types"]
    wrong = [name for name, mine in _LAYOUT if types.get(name, {}).get("size") != ctypes.sizeof(mine)]
    bits = types.get("GhosttyCell", {}).get("bits", {})
    wrong += [
        f"GhosttyCell.{name}"
        for name, place in _CELL_BITS.items()
        if (bits.get(name, {}).get("lsb"), bits.get(name, {}).get("width")) != place
    ]
    if wrong:
        names = ", ".join(wrong)
        raise EngineMissingError(f"The terminal model has other types than expected ({names}): pin pyghostty.")


@functools.cache
def load() -> Library:
    """Returns the library, loaded once; raises EngineMissingError if there is none that fits."""
    path = os.environ.get("PYGHOSTTY_LIB", "")
    if not path:
        spec = importlib.util.find_spec("pyghostty")
        if spec is None or not spec.submodule_search_locations:
            raise EngineMissingError("The package pyghostty is not installed: the simpler model is used instead.")
        suffix = "dylib" if os.uname().sysname == "Darwin" else "so"
        path = os.path.join(spec.submodule_search_locations[0], "_lib", f"libghostty-vt.{suffix}")
    return Library(path)
