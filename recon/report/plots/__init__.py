"""Pictures of reports: Pareto, drift, memory."""
