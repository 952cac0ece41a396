# Writes sim/version.cpp anew when the commit changed: cmake -DSOURCE=... -DOUT=... -P GitHash.cmake
execute_process(COMMAND git -C ${CMAKE_SOURCE_DIR} describe --always --dirty --abbrev=12
                OUTPUT_VARIABLE KVREPLAY_GIT_HASH OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
                RESULT_VARIABLE failed)
if(failed)
  set(KVREPLAY_GIT_HASH "unknown")
endif()
configure_file(${IN} ${OUT} @ONLY)
