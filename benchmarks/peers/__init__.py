"""Other task systems, set up as their documentation does, with the same trivial task.

Each file is one peer: its application, which its own command runs as a worker, and a class that
`python -m benchmarks.peers NAME` measures, in a process of its own.
"""
