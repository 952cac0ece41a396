# Two interface targets, linked PRIVATE and never exported: how our own code is compiled and what it is warned about.
add_library(kvreplay_flags INTERFACE)
target_include_directories(kvreplay_flags INTERFACE ${CMAKE_SOURCE_DIR})
# One level of threads: ours. No -ffast-math, ever: results must be the same tomorrow.
target_compile_definitions(kvreplay_flags INTERFACE EIGEN_DONT_PARALLELIZE)
set(KVREPLAY_CODE_OPTIONS -ffp-contract=fast -fno-math-errno)  # plug-ins share these
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # g++ 12.2 at -O3 with AVX-512 makes {2, 2, 0, 0} {2, 2, 2, 2}: one test showed it, and nothing is slower without.
  list(APPEND KVREPLAY_CODE_OPTIONS -fno-tree-slp-vectorize)
endif()
if(KVREPLAY_NATIVE)
  list(APPEND KVREPLAY_CODE_OPTIONS -march=native)
endif()
if(KVREPLAY_SANITIZE)
  list(APPEND KVREPLAY_CODE_OPTIONS -fsanitize=${KVREPLAY_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
endif()
target_compile_options(kvreplay_flags INTERFACE $<$<CONFIG:Release>:-O3> ${KVREPLAY_CODE_OPTIONS})
if(KVREPLAY_SANITIZE)
  target_link_options(kvreplay_flags INTERFACE -fsanitize=${KVREPLAY_SANITIZE})
endif()

add_library(kvreplay_warnings INTERFACE)
target_compile_options(kvreplay_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor
                                                   -Wold-style-cast -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # False alarms of g++ 12: initialised variables with Eigen and AVX-512, "x" + std::string (GCC bug 105651).
  target_compile_options(kvreplay_warnings INTERFACE -Wno-maybe-uninitialized -Wno-uninitialized
                                                     -Wno-restrict)
endif()
if(KVREPLAY_WERROR)
  target_compile_options(kvreplay_warnings INTERFACE -Werror)
endif()

# kvreplay_library(NAME SOURCES ... LINK ...): a static library of ours, with our flags and warnings.
function(kvreplay_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC kvreplay_flags ${ARG_PUBLIC} PRIVATE kvreplay_warnings ${ARG_PRIVATE})
endfunction()
