"""Guards: one file each, pure judgement of readings before and after a change.

A guard is a final class with `name`, `tier` ("T0" weights exact, "T1" weights, "T2" outputs, "advice" where it decides
nothing), `optional = True` where it speaks only if what it needs was read,
`needs` (the fields of `types.Readings` it reads), a frozen dataclass `Limits` in which each default
cites its evidence, and `judge(before, after, limits) -> Verdict`. It sees no model and does no I/O.
Registered by entry point `weightproof.guards`; nothing is imported here.
"""
