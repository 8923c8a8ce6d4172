from typing import Any

# Structures of the extension have their members at run time only.
ffi: Any
lib: Any
