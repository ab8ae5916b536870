"""When to measure: the callbacks for the Lightning Trainer."""
