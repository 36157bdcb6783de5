"""Measurements that anyone can run again, and rival methods. Start with `main_job`."""
