"""Diagnosis: what is here, what is missing, and how to mend it. ``python -m jax_ep.doctor`` prints it.

``installation`` looks at this machine, ``network`` at what groups across hosts need of it, and
``self_test`` tries them out between the processes of a job.
"""

from jax_ep.doctor.finding import Finding as Finding
