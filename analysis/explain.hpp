// `kvreplay explain`: replays one or two methods of a finished run again, and adds what their errors come from.
#pragma once
#include "sim/run.hpp"

namespace kvreplay {

struct ExplainRequest {
  std::filesystem::path results;    // the folder that `run` wrote
  std::string method, against;      // as typed in the run, or canonical; against may be empty
  std::string budget;               // as asked in the run; empty: the middle one
  std::vector<std::string> traces;  // names; empty: all where they are of one model, else the first
  std::vector<int> layers;          // empty: those of the run
  std::filesystem::path traces_in;  // where the traces lie now; empty: where the run found them
  int top = 200;                    // tokens listed per lane in tokens.csv
  int threads = 1;
  std::uint64_t memory = 0;  // bytes; 0: three quarters of what is free
  std::vector<std::string> argv;
  const std::atomic<bool>* stop = nullptr;
  std::function<void(double done, double total, const std::string& what)> progress;
};

struct ExplainOutcome {
  std::filesystem::path folder;  // RESULTS/explain/NAME: a results folder with attribution.h5, tokens.csv, explain.json
  RunOutcome run;
};

// ConfigError and TraceError before anything is replayed where the request cannot be met.
ExplainOutcome explain(const ExplainRequest&);

}  // namespace kvreplay
