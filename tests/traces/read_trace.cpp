// Prints what TraceReader makes of a file; a refusal is one sentence on stderr and exit code 3. For
// the Python tests.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "traces/info.hpp"
#include "traces/reader.hpp"
#include "traces/verify.hpp"

int main(int argc, char** argv) {
  try {
    const kvreplay::TraceReader trace(argc > 1 ? argv[1] : "");
    const kvreplay::VerifyReport report = kvreplay::verify(trace);
    std::vector<float> row(static_cast<std::size_t>(trace.info().head_dim));
    const int layer = trace.info().layers.back();
    trace.read_k(layer, trace.info().n_kv_heads - 1, trace.info().n_tokens - 1, trace.info().n_tokens, row);
    std::printf("{\"info\": %s, \"hash\": \"%s\", \"failures\": %zu, \"last_key\": [",
                kvreplay::info_json(trace).c_str(), report.hash.c_str(), report.failures.size());
    for (std::size_t i = 0; i < row.size(); ++i) {
      std::printf("%s%.9g", i > 0 ? ", " : "", static_cast<double>(row[i]));
    }
    std::printf("]}\n");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
