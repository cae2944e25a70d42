"""Operations on tensors. They know neither options nor process groups."""
