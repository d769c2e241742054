"""The demos that ``make demo``, ``make demo-penalties``, ``make demo-ranks`` and ``graphreg demo`` run, each in a process of its own."""
