"""Prints the tables of docs/evaluate.md: the paper's numbers, each with the command that measures it.

python benchmarks/paper_tables.py
"""

from opsin.evaluate.published import tables

if __name__ == "__main__":
    print(tables())
