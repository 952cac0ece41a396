// A trace file as raw bytes: mostly the HDF5 library's own parser, whose faults are not ours to mend.
#include "tests/fuzz/use_trace.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::filesystem::path path = kvreplay::fuzz::scratch() / "in.h5";
  kvreplay::fuzz::write_file(path, {reinterpret_cast<const char*>(data), size});
  kvreplay::fuzz::use_trace(path, false);
  return 0;
}
