"""Operations on tensors, one file each: forward, closed-form backward, derivation in the comments.

They know neither options nor process groups. Every custom backward is first-order only and says so when asked
for a second derivative.
"""
