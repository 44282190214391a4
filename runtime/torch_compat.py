"""Every private `torch._…` name Meshwright depends on, in one place.

The rule: no other module imports a private torch module, at the top or lazily (tests/test_imports.py holds this).
A function here is small, says which private name it wraps and why nothing public will do, and works on every
supported torch release (the oldest and the newest are tested). Imports of private modules stand inside the
functions, so that a name which moves breaks its one caller and not `import meshwright`.
"""

from __future__ import annotations
