"""Where a record goes: logged keys, figures, live correlation."""
