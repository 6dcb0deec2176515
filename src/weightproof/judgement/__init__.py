"""From readings to one decision: situations, assessment, evidence."""
