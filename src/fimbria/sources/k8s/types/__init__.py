"""Typed views of the API objects that Fimbria reads and writes: only the fields it uses.

Conventions (https://kubernetes.io/docs/reference/using-api/api-concepts/):
- Structs are frozen and untracked by the garbage collector; unknown fields are skipped while decoding. Never `replace`
  an object that somebody else also writes with a Struct: what it doesn't name would be lost. Patch it.
- A list or map that is absent may arrive as missing, `null` or empty, depending on who wrote it (Go serialises an
  unset list without `omitempty` as `null`), so those fields are `| None` and read as `x or ()`. Where absent and empty
  *mean* different things, the field's comment says so.
- Collections are tuples, so that a frozen object is really frozen.
"""
