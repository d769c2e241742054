"""Regularizes the stages of a pipeline one by one, so that together they are the regularized whole model.

Open ``stage.py`` first: ``regularize_stage`` traces and plans the whole model, and traces the stage. ``counterparts.py`` finds each
operation of the stage in the whole model, ``stage_trace.py`` and ``paths.py`` give the stage's values, modules and parameters their names
there, and ``stage_plan.py`` takes from the plan what falls to the stage. ``calls.py`` has what a call must know of the schedule.
"""
