"""Is this machine, cluster and store ready? Every check ends in rows that say how to mend."""
