"""Operations on tensors, one file each: forward, closed-form backward, derivation in the comments.

They know neither options nor process groups.
"""
