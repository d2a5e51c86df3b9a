"""Cases on threads, for tests that spend their time in compilers."""

import os
from concurrent.futures import ThreadPoolExecutor

THREADS = min(16, os.cpu_count() or 1)


def on_threads(function, cases):
    """function(case) for every case; the first failure is raised, with the case."""

    def run(case):
        try:
            function(case)
        except Exception as error:
            error.add_note(f"case: {case}")
            raise

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, cases))
