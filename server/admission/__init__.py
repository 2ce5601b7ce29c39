"""Who may come in, and when: keys, rates, the queue, memory, the drain."""
