"""Every row operation, forward and backward, as a program over `shared_specs.arithmetic`.

A function that returns a program is cached, so that each variant exists once.
"""
