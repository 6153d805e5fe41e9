"""What a training will need, computed before it starts: parameters, memory, traffic and time.

Plain numbers only: nothing here imports Megatron or torch. :func:`uar_megatron.planning.plan.plan`
puts it together.
"""
