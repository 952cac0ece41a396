"""How the tests start ranks."""

import os

MPIEXEC = os.environ.get("KVREPLAY_MPIEXEC", "mpirun")

# More ranks than processors, which must not wait in a loop; nothing that a container may not permit; no other machine.
RANKS = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
         "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
         "OMPI_MCA_btl_vader_single_copy_mechanism": "none", "OMPI_MCA_plm": "isolated"}
