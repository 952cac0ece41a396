// Decodes one sequence and writes its trace.
#pragma once
#include <atomic>
#include <filesystem>
#include <functional>
#include <string>

#include "trace_capture/decoder.hpp"
#include "trace_capture/job.hpp"
#include "trace_capture/plan.hpp"
#include "trace_capture/recorder.hpp"

namespace kvreplay {

struct CaptureOptions {
  StoreOptions store;
  Sampling sampling;
  bool ignore_eos = false;
  std::size_t stage_bytes = std::size_t{256} << 20;
  SlotMemory memory;                  // of the recorder's slots; empty = host_memory()
  std::string generator, provenance;  // as the trace says them
};

struct CaptureProgress {
  Pos done = 0, total = 0, prompt_len = 0;
  double seconds = 0;  // since the first pass
  Recorder::Rates rates;
};

// Who looks on, and may ask for an end.
struct Watch {
  const std::atomic<bool>* stop = nullptr;
  std::function<void(const CaptureProgress&)> progress;  // after each pass; may be empty
};

struct Captured {
  std::filesystem::path path;  // the trace; where interrupted, the .part file, or empty if no token was complete
  Pos n_tokens = 0, prompt_len = 0;
  bool interrupted = false, eos = false;  // eos: it ended there, before n_new tokens
  double prefill_seconds = 0, decode_seconds = 0;
  Recorder::Rates rates;
  std::uint64_t file_bytes = 0;
};

// Longest piece of text that the trace of this sequence may need; 0 without a tokenizer.
std::size_t piece_bytes(const Sequence& sequence, const Tokenizer* tokenizer);

// The decoder has room for the sequence; `tokenizer` may be nullptr, then no pieces are stored. What stops it is thrown
// on: TraceError (the file), DeviceError, ConfigError (a value that the element type cannot hold). After the first
// two, and where it was interrupted, <out>.part stays if it holds tokens, for `kvreplay recover`; nothing is ever left
// under the final name but a whole trace.
Captured capture(const Model& model, Decoder& decoder, const Sequence& sequence, const Tokenizer* tokenizer,
                 const CaptureOptions& options, const std::filesystem::path& out, const Watch& watch);

}  // namespace kvreplay
