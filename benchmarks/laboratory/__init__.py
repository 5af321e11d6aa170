"""The enumerated laboratory: objectives as they run, trained where every response can be listed, beside what theory promises.

`world` is what there is to learn, `learn` trains in it, `theory` has the optima, `cases` brings the two together, `claims`
looks at statements of the literature, `game` lets INPO play one. `python -m benchmarks.laboratory` prints the tables;
tests/test_laboratory.py asserts them.
"""
