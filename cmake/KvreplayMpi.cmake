# Processes that share a sweep over MPI: built where MPI is (AUTO), never (OFF), or else an error (ON).
# Sets KVREPLAY_HAS_MPI.
set(KVREPLAY_MPI AUTO CACHE STRING "Let processes of mpirun or srun share a sweep: AUTO, ON or OFF")
set_property(CACHE KVREPLAY_MPI PROPERTY STRINGS AUTO ON OFF)

set(KVREPLAY_HAS_MPI OFF)
if(NOT KVREPLAY_MPI STREQUAL "OFF")
  find_package(MPI QUIET COMPONENTS C)
  if(MPI_C_FOUND)
    set(KVREPLAY_HAS_MPI ON)
  elseif(KVREPLAY_MPI STREQUAL "ON")
    message(FATAL_ERROR "KVREPLAY_MPI is ON, but no MPI was found; install libopenmpi-dev and openmpi-bin")
  else()
    message(STATUS "kvreplay: no MPI was found (libopenmpi-dev): a sweep runs in one process, or in shards")
  endif()
endif()
