#include <catch2/catch.hpp>
#include <filesystem>

#include "traces/verify.hpp"

namespace kvreplay::test {

TEST_CASE("the bundled samples are whole, and their keys are rotated as declared") {
  int n_samples = 0;
  std::uintmax_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(KVREPLAY_SAMPLES)) {
    if (entry.path().extension() != ".h5") {
      continue;
    }
    INFO(entry.path());
    const TraceReader trace(entry.path());
    CHECK(trace.info().complete);
    CHECK_FALSE(trace.info().provenance.empty());
    const VerifyReport report = verify(trace);
    CHECK(report.failures.empty());
    CHECK(report.hash_stored);
    for (const RopeEvidence& evidence : report.evidence) {
      CHECK(evidence.pairing == "supports");
      CHECK(evidence.frequencies == "supports");
    }
    ++n_samples;
    bytes += entry.file_size();
  }
  CHECK(n_samples >= 2);
  CHECK(bytes <= std::uintmax_t{24} << 20);
}

}  // namespace kvreplay::test
