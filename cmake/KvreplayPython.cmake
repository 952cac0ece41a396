# The Python of the tests and of the module `kvreplay`: the one that scripts/setup made, unless another is named.
if(NOT KVREPLAY_PYTHON AND EXISTS ${CMAKE_SOURCE_DIR}/.venv/bin/python)
  set(KVREPLAY_PYTHON ${CMAKE_SOURCE_DIR}/.venv/bin/python)
endif()
set(KVREPLAY_PYTHON "${KVREPLAY_PYTHON}" CACHE FILEPATH
    "Python with numpy, h5py and pytest, for the Python tests; the module `kvreplay` is built for it")
