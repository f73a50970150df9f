"""The laboratory: networks and data, experiments, sweeps, records and reports. The library never imports it."""
