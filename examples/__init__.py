"""The demos that ``make demo``, ``make demo-penalties`` and ``graphreg demo`` run, each in a process of its own."""
