"""Benign snippets whose standard output and exit code must be the same here and in a fresh Python."""

# ruff: noqa: E501  a snippet is one line of text, however long

from __future__ import annotations

from textwrap import dedent
from typing import Any, NamedTuple


class Snippet(NamedTuple):
    """A program, its standard input, and further fields of the request."""

    name: str
    code: str
    stdin: str = ""
    request: dict[str, Any] = {}  # noqa: RUF012  never changed


def _s(name: str, code: str, stdin: str = "", **request: Any) -> Snippet:
    return Snippet(name, dedent(code).lstrip("\n"), stdin, request)


PLAIN = (
    _s("print", "print('hello', 1, 2.5, sep='-', end='!')"),
    _s("empty program", ""),
    _s("comment only", "# nothing"),
    _s("arithmetic", "print(7 // 2, -7 // 2, 7 % -3, 2 ** 100, 0.1 + 0.2, 1e300 * 1e10)"),
    _s("big integers", "print(len(str(3 ** 2000)), hash(2 ** 61 - 1))"),
    _s("unicode", "print('äöü ß 漢字 🎈', '\\u00e9' == 'é', len('🎈'))"),
    _s("unicode identifiers", "größe = 3\nπ = 3.14\nprint(größe * π)"),
    _s("bytes on stdout", "import sys; sys.stdout.buffer.write(b'abc\\n'); sys.stdout.flush()"),
    _s("stderr only", "import sys; print('x', file=sys.stderr)"),
    _s("set order", "print({'a', 'b', 'c', 'd', 'e'})"),
    _s("input", "a, b = map(int, input().split())\nprint(a + b)", "3 4\n"),
    _s("input with prompt", "print(input('name? ').upper())", "ada\n"),
    _s("input until EOF", "import sys\nprint(sum(int(l) for l in sys.stdin))", "1\n2\n3"),
    _s("input at EOF", "print('x')\ninput()"),
    _s("stdin whole", "import sys; print(len(sys.stdin.read()))", "abc\n" * 50_000),
    _s("open descriptor 0", "print(open(0).read())", "via fd 0"),
    _s("unicode input", "print(input()[::-1])", "äöü"),
    _s("exit 0", "import sys; print('x'); sys.exit()"),
    _s("exit 3", "import sys; print('x'); sys.exit(3)"),
    _s("exit -1", "import sys; sys.exit(-1)"),
    _s("exit 256", "import sys; sys.exit(256)"),
    _s("exit text", "import sys; sys.exit('bad')"),
    _s("raise SystemExit", "raise SystemExit(5)"),
    _s("quit", "quit(4)"),
    _s("os._exit", "import os; print('x', flush=True); os._exit(9)"),
    _s("zero division", "print('a')\n1 / 0\nprint('b')"),
    _s("own exception", "class E(Exception): pass\nraise E('ä')"),
    _s("chained exception", "try:\n    {}['a']\nexcept KeyError as e:\n    raise ValueError('b') from e"),
    _s("exception group", "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])"),
    _s("assert", "assert 1 == 2, 'no'"),
    _s("syntax error", "print('a')\nfor\n"),
    _s("indentation error", "if 1:\nprint(2)"),
    _s("name error", "def f():\n    return undefined\nf()"),
    _s("exception with notes", "e = ValueError('a'); e.add_note('note'); raise e"),
    _s("recursion", "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nprint(fib(20))"),
    _s("deep recursion", "import sys\nsys.setrecursionlimit(5000)\ndef d(n): return 0 if n == 0 else 1 + d(n - 1)\nprint(d(4000))"),
    _s("recursion error", "def f(): f()\ntry: f()\nexcept RecursionError: print('deep')"),
    _s("lines of output", "for i in range(5000): print(i)"),
    _s("big output", "print('x' * 60_000)"),
    _s("dataclass", "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\nprint(P())"),
    _s("main guard", "if __name__ == '__main__': print(__name__)"),
    _s("globals", "print(sorted(k for k in globals() if not k.startswith('__')))"),
    _s("pickle own class", "import pickle\nclass A:\n    x = 1\nprint(pickle.loads(pickle.dumps(A())).x)"),
    _s("annotations", "from __future__ import annotations\ndef f(x: Nope) -> int: ...\nprint(f.__annotations__)"),
    _s("type hints", "import typing\nclass A:\n    b: 'A'\nprint(typing.get_type_hints(A)['b'].__name__)"),
    _s("inspect source", "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))"),
    _s("threads", "import threading\nr = []\nt = [threading.Thread(target=r.append, args=(i,)) for i in range(8)]\n[x.start() for x in t]; [x.join() for x in t]\nprint(sorted(r))"),
    _s("thread after the end", "import threading, time\ndef f():\n    time.sleep(0.05); print('late')\nthreading.Thread(target=f).start()\nprint('end')"),
    _s("thread pool", "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p: print(list(p.map(abs, range(-3, 3))))"),
    _s("asyncio", "import asyncio\nasync def f(n):\n    await asyncio.sleep(0.01); return n\nasync def m(): return await asyncio.gather(f(1), f(2))\nprint(asyncio.run(m()))"),
    _s("atexit", "import atexit\natexit.register(print, 'bye')\nprint('hi')"),
    _s("finalizer at the end", "class A:\n    def __del__(self): print('gone')\na = A()\nprint('end')"),
    _s("signal handler", "import signal, os\nsignal.signal(signal.SIGUSR1, lambda *a: print('got it'))\nos.kill(os.getpid(), signal.SIGUSR1)"),
    _s("alarm", "import signal, time\ndef h(*a): raise TimeoutError('alarm')\nsignal.signal(signal.SIGALRM, h)\ntry:\n    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    time.sleep(5)\nexcept TimeoutError as e: print(e)"),
    _s("unhandled alarm", "import signal, time\nprint('x', flush=True)\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(5)"),
    _s("signal to itself", "import signal, os\nprint('x', flush=True)\nos.kill(os.getpid(), signal.SIGTERM)"),
    _s("files in /tmp", "import os\nos.makedirs('/tmp/a/b')\nwith open('/tmp/a/b/c', 'w') as f: f.write('x')\nprint(open('/tmp/a/b/c').read(), os.listdir('/tmp/a'))"),
    _s("temporary files", "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x'); f.seek(0); print(f.read())\nwith tempfile.TemporaryDirectory() as d: print(len(d) > 5)"),
    _s("shutil copy", "import shutil, os\nopen('/tmp/a', 'w').write('x')\nshutil.copy2('/tmp/a', '/tmp/b')\nprint(open('/tmp/b').read())"),
    _s("module of its own", "open('/tmp/mine.py', 'w').write('x = 42')\nimport importlib; importlib.invalidate_caches()\nimport mine\nprint(mine.x)"),
    _s("sqlite", "import sqlite3\nc = sqlite3.connect('/tmp/d.db')\nc.execute('create table t (a)'); c.execute('insert into t values (1)'); c.commit()\nprint(c.execute('select * from t').fetchall())"),
    _s("ctypes", "import ctypes\nprint(ctypes.CDLL(None).abs(-3))"),
    _s("hashlib and zlib", "import hashlib, zlib\nprint(hashlib.sha256(b'x').hexdigest(), zlib.crc32(b'x'))"),
    _s("decimal and fractions", "from decimal import *; from fractions import Fraction\ngetcontext().prec = 30\nprint(Decimal(1) / 7, Fraction(1, 3) + 1)"),
    _s("datetime", "import datetime\nprint(datetime.date(2024, 2, 29) + datetime.timedelta(365))"),
    _s("itertools", "import itertools, math\nprint(list(itertools.permutations('abc', 2))[:4], math.comb(50, 25))"),
    _s("exec and eval", "exec('y = 4'); print(eval('y * 2'))"),
    _s("walrus and match", "match [1, 2]:\n    case [a, b]: print(a + b)\nprint((z := 5))"),
    _s("warnings", "import warnings\nwarnings.warn('careful')\nprint('on')"),
    _s("seeded random", "import random\nrandom.seed(1); print(random.random(), random.sample(range(100), 5))"),
    _s("logging", "import logging\nlogging.warning('w')\nprint('x')"),
    _s("memory error caught", "try: bytearray(1 << 62)\nexcept (MemoryError, OverflowError): print('no')"),
)  # fmt: skip

LIBRARIES = (
    _s("numpy", "import numpy as np\nprint(np.arange(6).reshape(2, 3) @ np.ones((3, 2)), np.linalg.eigvalsh([[2, 1], [1, 2]]).round(6))"),
    _s("numpy print", "import numpy as np\nprint(np.array([1.5, 2, 3e10]), repr(np.float64(2)))"),
    _s("numpy seeded", "import numpy as np\nnp.random.seed(0); print(np.random.rand(3), np.random.default_rng(1).integers(0, 9, 5))"),
    _s("numpy error", "import numpy as np\nprint(np.ones(3) @ np.ones(4))"),
    _s("numpy warning", "import numpy as np\nprint(np.array([1.0]) / 0)"),
    _s("sympy solve", "from sympy import *\nx = symbols('x')\nprint(solve(x**3 - 6*x**2 + 11*x - 6, x), factor(x**4 - 1))"),
    _s("sympy integrate", "from sympy import *\nx = symbols('x')\nprint(integrate(exp(-x**2), (x, -oo, oo)), diff(sin(x)**2, x), series(cos(x), x, 0, 6))"),
    _s("sympy numbers", "from sympy import *\nprint(factorint(2**32 - 1), isprime(10**9 + 7), Rational(3, 7).evalf(30), totient(100))"),
    _s("sympy matrix", "from sympy import Matrix\nm = Matrix([[1, 2], [3, 4]])\nprint(m.inv(), m.det(), m.eigenvals())"),
    _s("sympy pretty", "from sympy import *\ninit_printing(use_unicode=True)\nx, y = symbols('x y')\npprint(Integral(x**2 / y, x))\nprint(latex(x**2 / y))"),
    _s("sympy dummy order", "from sympy import *\nx, y, z = symbols('x y z')\nprint(expand((x + y + z)**3), Dummy('a'), simplify(sin(x)**2 + cos(x)**2))"),
    _s("sympy system", "from sympy import *\na, b = symbols('a b')\nprint(solve([a**2 + b**2 - 25, a - b - 1], [a, b]))"),
    _s("mpmath", "import mpmath\nmpmath.mp.dps = 40\nprint(mpmath.zeta(3), mpmath.findroot(mpmath.cos, 1))"),
    _s("mpmath default precision", "import mpmath\nprint(mpmath.mp.dps, mpmath.mpf(1) / 3)"),
    _s("scipy", "from scipy import optimize, integrate, special\nprint(round(optimize.brentq(lambda x: x**2 - 2, 0, 2), 9), round(integrate.quad(lambda x: x, 0, 1)[0], 9), special.comb(5, 2))"),
    _s("scipy stats", "from scipy import stats\nprint(round(stats.norm.cdf(1.96), 6), stats.binom.pmf(2, 4, 0.5).round(6))"),
    _s("scipy linprog", "from scipy.optimize import linprog\nr = linprog([-1, -2], A_ub=[[1, 1]], b_ub=[4])\nprint(r.status, r.fun)"),
    _s("networkx", "import networkx as nx\ng = nx.petersen_graph()\nprint(nx.diameter(g), nx.shortest_path(g, 0, 7), nx.is_connected(g))"),
    _s("pandas", "import pandas as pd\nd = pd.DataFrame({'a': [1, 2, 3], 'b': list('xyx')})\nprint(d.groupby('b').a.sum(), d.describe())"),
    _s("pandas dates", "import pandas as pd\nprint(pd.date_range('2024-01-30', periods=3, freq='D'))"),
    _s("all together", "import numpy, scipy, sympy, mpmath, networkx, pandas\nprint(sympy.Matrix(numpy.eye(2).astype(int)))"),
)  # fmt: skip

SNIPPETS = (*PLAIN, *LIBRARIES)

ECHOED = (
    ("6 * 7", "42\n"),
    ("x = 2\nx ** 3", "8\n"),
    ("'text'", "'text'\n"),
    ("None", ""),
    ("x = 1", ""),
    ("print(1)", "1\n"),
    ("print(1); 2", "1\n2\n"),
    ("for i in range(2): i", ""),
    ("'''a\nb'''", "'a\\nb'\n"),
    ("[1,\n 2]  # comment", "[1, 2]\n"),
    ("import sympy\nx = sympy.Symbol('x')\nsympy.diff(x**2, x)", "2*x\n"),
    ("import numpy as np\nnp.arange(3)", "array([0, 1, 2])\n"),
    ("from __future__ import annotations\n1 + 1", "2\n"),
    ("def f(): return 5\nf()", "5\n"),
    ("(y := 3)", "3\n"),
    ("'ä'", "'ä'\n"),
    ("", ""),
)
"""Code, and what an interactive interpreter shows for its last expression."""

LINES = (
    ("1 / 0", "ZeroDivisionError", 1),
    ("x = 1\n\n\nx.y", "AttributeError", 4),
    ("def f():\n    raise ValueError('v')\n\nf()", "ValueError", 2),
    ("x = 1\nif x\n    pass", "SyntaxError", 2),
    ("def f():\nreturn 1", "IndentationError", 2),
    ("import json\n\njson.loads('{')", "JSONDecodeError", 3),
    ("import numpy as np\nnp.ones(2) @ np.ones(3)", "ValueError", 2),
    ("x = [\n1,\n2,\nundefined]", "NameError", 4),
)
"""Code, the uncaught exception, and the line that raised it."""
