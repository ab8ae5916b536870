"""The promise that measuring leaves no trace: in modules, data sets, generators, flags."""
