// Catch2's main, after a look for a device: without one the tests are skipped, and say so.
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <iostream>

#include "trace_capture/device_rows.hpp"

int main(int argc, char** argv) {
  if (!kvreplay::device_pointers_supported()) {
    std::cout << "skipped: no CUDA device\n";
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
