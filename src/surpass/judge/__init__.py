"""How good are the answers, and why?

Nothing is imported here: verifier processes import single modules of this room and must start fast.
"""
