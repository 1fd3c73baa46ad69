"""What a zygote imports and exercises before its first fork, so that runs need not.

A run forked from a warm sympy solves an equation in 16 ms where a fresh Python takes 0.4 s, most of it imports and
first-call caches. An exercise must leave no state that a snippet could notice: no settings, no seeds, no open files.
"""

STANDARD_LIBRARY = (
    "__future__", "abc", "array", "ast", "base64", "bisect", "cmath", "collections", "collections.abc", "contextlib",
    "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq", "inspect", "io",
    "itertools", "json", "linecache", "math", "numbers", "operator", "pathlib", "random", "re", "signal", "statistics",
    "string", "struct", "textwrap", "threading", "time", "traceback", "typing", "warnings", "weakref",
)  # fmt: skip
"""What calculating programs import. Every page more makes every fork dearer, so what few of them use and loads much
(asyncio with ssl, hashlib with libcrypto, logging, subprocess) is left to the run that wants it.
"""

SUBMODULES = {
    "numpy": ("numpy.random", "numpy.linalg", "numpy.fft", "numpy.polynomial"),
    "scipy": (
        "scipy.special",
        "scipy.linalg",
        "scipy.optimize",
        "scipy.integrate",
        "scipy.interpolate",
        "scipy.stats",
        "scipy.sparse",
    ),
    "sympy": ("sympy.ntheory", "sympy.combinatorics", "sympy.geometry", "sympy.stats"),
}

EXERCISE = {
    "sympy": """
import sympy as s
x, y = s.symbols("x y")
n = s.symbols("n", integer=True)
s.solve(x**2 - 2, x)
s.solve([x + y - 3, x - y - 1], [x, y])
s.integrate(s.sin(x) * x, x)
s.diff(s.exp(x**2), x)
s.limit(s.sin(x) / x, x, 0)
s.series(s.exp(x), x, 0, 3)
s.summation(n, (n, 1, 10))
s.simplify(s.sin(x) ** 2 + s.cos(x) ** 2)
s.factor(x**3 - 1)
s.expand((x + y) ** 3)
s.factorint(360)
s.isprime(97)
s.Matrix([[1, 2], [3, 4]]).det()
s.Rational(1, 3) + s.pi
s.sqrt(8).evalf(20)
s.nsimplify(0.5)
s.latex(x**2 / y)
str(s.sqrt(2) * x)
""",
    "numpy": """
import numpy as np
(np.ones((4, 4)) @ np.ones((4, 4))).sum()
np.linalg.det(np.eye(3))
repr(np.arange(3.0))
""",
    "pandas": "import pandas as pd; repr(pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']}).groupby('b').sum())",
    "networkx": "import networkx as nx; nx.shortest_path(nx.path_graph(4), 0, 3)",
    "mpmath": "import mpmath; mpmath.sqrt(2); mpmath.quad(mpmath.sin, [0, 1])",
}
