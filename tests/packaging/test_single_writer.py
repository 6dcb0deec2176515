"""Only `snapshot.py` writes to parameters and buffers: a rule on the syntax of the three source roots.

Refused everywhere else:
- assignment to `.data`, `.weight` or `.bias` of anything, whole or by index, and `out=` into them;
- assignment into, or calls that change, `_parameters`, `_buffers` or `_modules`;
- `copy_`, `set_`, `swap_tensors`, `setattr`, `register_parameter`, `register_buffer`, `nn.init.*_`, and
  `load_state_dict` on something called a model or module;
- any other in-place tensor method, unless its receiver is a local name that only ever holds fresh
  memory (the result of an allocation, of arithmetic or of a decomposition).

Syntax cannot see aliases made by a helper function, nor `W[i] = x` where W is a view. The exceptions
in `ALLOWED` each carry their reason.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = ("src", "callbacks", "recipes")
WRITER = "src/weightproof/snapshot.py"

# (file, function) -> why this write cannot reach a parameter or buffer of a guarded model.
ALLOWED = {
    ("src/weightproof/collective.py", "_copy_to_itself"): "fills the buffers that shards allocate to receive into",
    ("src/weightproof/collective.py", "_move"): "fills the buffers that shards allocate to receive into",
    (
        "src/weightproof/parallel/shards.py",
        "_carry",
    ): "fills the wholes and parts that assemble and distribute allocate",
    ("src/weightproof/parallel/shards.py", "_copy_here"): "as in _carry, whose moves it makes",
    (
        "callbacks/weightproof_callbacks/optimizer_state.py",
        "_write",
    ): "writes the state tensors of an optimizer; one that shares memory with a weight is refused at capture",
    (
        "callbacks/weightproof_callbacks/learning_rate.py",
        "_scaled",
    ): "scales the learning rates that an optimizer and its schedules keep as tensors",
    (
        "callbacks/weightproof_callbacks/fault_drill.py",
        "_train_through",
    ): "clips the gradients of the drill's own copy of a model",
    (
        "src/weightproof/testing/tampering.py",
        "overwrite",
    ): "an injected fault: it damages a weight, a gradient or a moment on purpose, in drills that a user asked for",
    ("src/weightproof/curvature/moments.py", "_add_products"): "adds to the sums over tokens that the moments allocate",
    ("src/weightproof/curvature/moments.py", "add"): "adds to the sums over tokens that the moments allocate",
    (
        "src/weightproof/testing/conformance.py",
        "_write",
    ): "changes of the small model that the conformance kit makes for itself",
    ("src/weightproof/curvature/mask.py", "zero_outside"): "zeroes coefficients, a product with the matrix",
    ("src/weightproof/curvature/projection.py", "_zero_below"): "zeroes coefficients, a product with the matrix",
    ("src/weightproof/numerics/gram.py", "_add_gram"): "total is the accumulator that gram() allocates",
    ("src/weightproof/numerics/lanczos.py", "_orthogonalise"): "vector is a Lanczos vector, a product with the matrix",
    ("src/weightproof/numerics/lanczos.py", "_step"): "left and right are vectors, products with the matrix",
}

TENSOR_ATTRIBUTES = {"data", "weight", "bias"}
TABLES = {"_parameters", "_buffers", "_modules"}
ALWAYS_REFUSED = {"copy_", "set_", "swap_tensors", "register_parameter", "register_buffer", "index_copy_", "resize_"}
TABLE_CHANGES = {"update", "pop", "popitem", "clear", "setdefault"}
# Methods that end in an underscore and write no tensor values.
NOT_WRITES = {"requires_grad_", "manual_seed_", "share_memory_", "retain_grad_"}
# Calls whose result is new memory. `.to`, `.float`, `.contiguous`, `.reshape` are not: they may return a view.
FRESH_CALLS = {
    *("empty", "zeros", "ones", "full", "eye", "arange", "linspace", "tensor", "rand", "randn", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided", "clone"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "cat", "stack", "where", "minimum", "maximum"),
    *("matmul", "mm", "bmm", "mv", "einsum", "outer", "square", "sqrt", "rsqrt", "reciprocal", "abs", "exp", "log"),
    *("sum", "mean", "norm", "vector_norm", "matrix_norm", "bincount", "cumsum", "logsumexp", "log_softmax", "softmax"),
    *("eigvalsh", "svdvals", "histc", "square", "neg", "mul", "add", "sub", "div", "pow", "round", "frexp", "ldexp"),
}
# Calls that may return their receiver's own memory: fresh when the receiver is.
VIEW_CALLS = {
    *("double", "float", "half", "to", "cpu", "contiguous", "detach", "flip", "t", "view", "reshape", "flatten"),
    *("narrow", "diagonal", "unsqueeze", "squeeze", "expand", "transpose", "permute"),
}
FRESH_NODES = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Constant)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_fresh(node: ast.expr | None, names: set[str]) -> bool:
    """Whether an expression certainly gives new memory, when the locals in `names` hold such."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.IfExp):
        return is_fresh(node.body, names) and is_fresh(node.orelse, names)
    if isinstance(node, ast.Subscript):
        return is_fresh(node.value, names)
    if not isinstance(node, ast.Call):
        return isinstance(node, FRESH_NODES)
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    copies = any(keyword.arg == "copy" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
    passes_on = name in VIEW_CALLS or name.endswith("_")
    on_fresh = passes_on and isinstance(called, ast.Attribute) and is_fresh(called.value, names)
    return name in FRESH_CALLS or copies or on_fresh


def assignments(function: ast.AST) -> list[tuple[str, ast.expr | None]]:
    """(local name, expression or None) for everything that binds a name in a function."""
    found: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found += bindings(target, node.value)
        elif isinstance(node, ast.NamedExpr) or (isinstance(node, ast.AnnAssign) and node.value is not None):
            found += bindings(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            found += bindings(node.target, None)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            found += bindings(node.optional_vars, None)
        elif isinstance(node, ast.arg):
            found.append((node.arg, None))
    return found


def bindings(target: ast.expr, value: ast.expr | None) -> list[tuple[str, ast.expr | None]]:
    """The names that an assignment binds, each with its own expression where it has one."""
    if isinstance(target, ast.Name):
        return [(target.id, value)]
    if not isinstance(target, (ast.Tuple, ast.List)):
        return []
    values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
    parts = [bindings(part, values[i] if values else None) for i, part in enumerate(target.elts)]
    return [pair for part in parts for pair in part]


def fresh_locals(function: ast.AST) -> set[str]:
    """Local names that every assignment in this function fills with new memory."""
    bound = assignments(function)
    fresh = {name for name, _ in bound}
    while stale := {name for name, value in bound if name in fresh and not is_fresh(value, fresh)}:
        fresh -= stale
    return fresh


def root_of(node: ast.expr) -> ast.expr:
    """The object behind indexing: `x` of `x[0][1]`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node


def writes_in(function: ast.AST, nodes: list[ast.AST]) -> list[tuple[int, str]]:
    """(line, what) of each refused write among the nodes of one function."""
    fresh = fresh_locals(function)
    found = []
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            parts = [part for target in targets for part in flatten(target)]
            found += [(node.lineno, f"assigns to {ast.unparse(part)}") for part in parts if is_tensor_slot(part)]
        elif isinstance(node, ast.Call) and (reason := refused_call(node, fresh)):
            found.append((node.lineno, reason))
    return found


def flatten(target: ast.expr) -> list[ast.expr]:
    """The single targets of an assignment."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return [part for element in target.elts for part in flatten(element)]
    return [target.value] if isinstance(target, ast.Starred) else [target]


def is_tensor_slot(target: ast.expr) -> bool:
    """Whether an assignment target is a parameter, its data, or a table that holds parameters."""
    root = root_of(target)
    if not isinstance(root, ast.Attribute):
        return False
    return root.attr in TENSOR_ATTRIBUTES or (root is not target and root.attr in TABLES)


def refused_call(node: ast.Call, fresh: set[str]) -> str | None:
    """Why a call may write to a parameter, or None."""
    for keyword in node.keywords:
        if keyword.arg == "out" and is_tensor_slot(keyword.value):
            return f"writes out= into {ast.unparse(keyword.value)}"
    if isinstance(node.func, ast.Name):
        return f"calls {node.func.id}" if node.func.id in {"setattr", "swap_tensors"} else None
    return refused_method(node.func, fresh) if isinstance(node.func, ast.Attribute) else None


def refused_method(called: ast.Attribute, fresh: set[str]) -> str | None:
    """Why a method call may write to a parameter, or None."""
    name, receiver, text = called.attr, called.value, ast.unparse(called.value)
    on_table = isinstance(receiver, ast.Attribute) and receiver.attr in TABLES
    on_model = text.rpartition(".")[2].lstrip("_") in {"model", "module"}
    if name in ALWAYS_REFUSED or (name == "load_state_dict" and on_model) or (name in TABLE_CHANGES and on_table):
        return f"calls {text}.{name}"
    in_place = name.endswith("_") and not name.startswith("_") and not name.endswith("__") and name not in NOT_WRITES
    if in_place and not is_fresh(receiver, fresh):
        return f"calls {text}.{name} on what may be a parameter"
    return None


def violations(source: str) -> list[tuple[str, int, str]]:
    """(function, line, what) of every refused write in a module's source."""
    tree = ast.parse(source)
    found = []

    def visit(owner: ast.AST, name: str) -> None:
        own: list[ast.AST] = []
        pending = list(ast.iter_child_nodes(owner))
        while pending:
            node = pending.pop()
            if isinstance(node, FUNCTIONS):
                visit(node, node.name)
                continue
            own.append(node)
            pending.extend(ast.iter_child_nodes(node))
        found.extend((name, line, what) for line, what in writes_in(owner, own))

    visit(tree, "<module>")
    return sorted(found)


def source_files() -> list[Path]:
    return sorted(path for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py"))


def test_only_the_snapshot_writes_to_parameters():
    found = [
        f"{path.relative_to(ROOT)}:{line} ({function}) {what}"
        for path in source_files()
        if path.relative_to(ROOT).as_posix() != WRITER
        for function, line, what in violations(path.read_text(encoding="utf-8"))
        if (path.relative_to(ROOT).as_posix(), function) not in ALLOWED
    ]
    assert not found, "only snapshot.py may write to parameters:\n" + "\n".join(found)


def test_the_rule_sees_the_writer_itself():
    assert {what for _, _, what in violations((ROOT / WRITER).read_text(encoding="utf-8"))} >= {
        "assigns to tensor.data",
        "calls target.copy_",
    }


def test_every_exception_is_still_needed():
    for (path, function), reason in ALLOWED.items():
        assert reason
        assert function in {name for name, _, _ in violations((ROOT / path).read_text(encoding="utf-8"))}


PLANTED = [
    "parameter.data = values",
    "parameter.data[0] = 1.0",
    "parameter.data += values",
    "module.weight = values",
    "module.weight[2, 3] = 0.0",
    "model.a.b.bias = None",
    "(kept, module.weight) = pair",
    "del module.weight",
    "parameter.copy_(values)",
    "matrix.load().copy_(values)",
    "parameter.set_(storage)",
    "parameter.mul_(2)",
    "model.head.weight.zero_()",
    "model.head.weight[0].fill_(1)",
    "parameter.clamp_(-1, 1)",
    "nn.init.normal_(parameter)",
    "torch.add(a, b, out=module.weight)",
    "torch.add(a, b, out=parameter.data[1:])",
    "setattr(module, name, value)",
    "module._parameters['weight'] = value",
    "module._buffers.update(values)",
    "module.register_buffer('x', value)",
    "torch.utils.swap_tensors(a, b)",
    "self._model.load_state_dict(state)",
    "weight = matrix.load()\n    weight.mul_(2)",
    "weight = matrix.load().float()\n    weight.add_(1)",
    "weight = torch.zeros(3)\n    weight = matrix.load()\n    weight.add_(1)",
    "for weight in model.parameters():\n        weight.add_(1)",
    "weight, other = matrix.load(), torch.zeros(3)\n    weight.add_(1)",
]


@pytest.mark.parametrize("body", PLANTED)
def test_a_planted_write_is_found(body):
    found = violations(f"def guard(matrix, parameter, module, model):\n    {body}\n")
    assert len(found) == 1
    assert found[0][0] == "guard"


HARMLESS = [
    "total = torch.zeros(3)\n    total.add_(1)",
    "gram = W @ W.T\n    gram.diagonal().sum()\n    gram.mul_(0.5)",
    "total, count = torch.zeros(3), 0\n    total[0].add_(1)",
    "work = W.clone().double()\n    work.square_()",
    "scale = 2 * W\n    scale += 1",
    "self.readings = values",
    "table['weight'] = 1",
    "object.__setattr__(self, 'include', include)",
    "optimizer.load_state_dict(state)",
    "torch.matmul(a, b, out=buffer)",
    "(W - 1).square_()",
    "W.to(torch.float64, copy=True).sub_(1)",
    "torch.linalg.eigvalsh(W).flip(0).cpu().clamp_(min=0).sqrt_().div_(2)",
    "buffer = None\n    buffer = torch.empty_like(W) if buffer is None else buffer\n    buffer.mul_(buffer)",
]


@pytest.mark.parametrize("body", HARMLESS)
def test_work_on_fresh_memory_is_allowed(body):
    assert violations(f"def measure(self, W, values):\n    {body}\n") == []
