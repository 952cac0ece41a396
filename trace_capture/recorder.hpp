// Carries packets from a decoder to the trace file: a ring of equal slots, filled by the decoder, emptied in order by a
// writer thread. When all slots are full the decoder waits (nothing is ever dropped), and how long it waited is
// counted.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "trace_capture/packet.hpp"
#include "traces/writer.hpp"

namespace kvreplay {

// Where slots live. The CUDA backend gives pinned memory.
struct SlotMemory {
  std::function<std::byte*(std::size_t)> allocate;
  std::function<void(std::byte*)> release;
};
SlotMemory host_memory();

class Recorder {
 public:
  struct Options {
    std::size_t stage_bytes = std::size_t{256} << 20;  // of all slots together, at least two slots
    Pos max_pass = 512;                                // tokens of the largest packet of one layer
    double commit_seconds = 1;                         // a killed capture loses at most about this much
    SlotMemory memory;                                 // empty = host_memory()
  };
  struct Slot {
    std::size_t index = 0;  // in [0, n_slots)
    PacketLayout layout;
    std::span<std::byte> bytes;  // (layout.bytes)
  };
  struct Rates {
    double stall_seconds = 0;  // the decoder waited for a free slot
    double write_seconds = 0;  // the writer thread was busy
    std::uint64_t bytes = 0;   // handed to the file
  };

  // Writes through `writer`, which must outlive the recorder; nobody else may use it until finish().
  Recorder(RecordPlan plan, TraceWriter& writer, Options options);
  ~Recorder();  // drains what was submitted
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  const RecordPlan& plan() const { return plan_; }
  std::size_t n_slots() const;
  std::size_t slot_bytes() const;
  // The index of a layer in plan().layers, or -1 if it is not recorded.
  int index_of(int layer) const;
  // May the rows of all recorded layers of a pass of n tokens travel in one packet?
  bool fits(Pos n) const;

  // A free slot for tokens [first, first + n) of the layers plan().layers[begin, end); waits until there is one.
  // Rethrows what stopped the writer thread.
  Slot acquire(Pos first, Pos n, std::size_t begin, std::size_t end);
  // The slot's bytes are complete once ready() returned (called on the writer thread; empty = complete now).
  void submit(const Slot& slot, std::function<void()> ready = {});
  // The ids of tokens whose rows were submitted. logprob, pieces: (ids) or empty.
  void tokens(std::span<const std::int32_t> ids, std::span<const float> logprob,
              std::span<const std::string> pieces = {});
  // acquire, pack and submit for one layer of a pass: all that the CPU backend needs.
  void record(int layer, Pos first, Pos n, const LayerRows& rows);

  void finish();  // waits until everything is in the file and committed; rethrows what went wrong
  Rates rates() const;

 private:
  struct Item;
  void work();

  RecordPlan plan_;
  TraceWriter& writer_;
  Options options_;
  std::vector<std::byte*> slots_;
  std::size_t slot_bytes_ = 0;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::size_t> free_;
  std::deque<Item> queue_;
  std::exception_ptr failure_;
  bool closing_ = false, idle_ = true;
  Rates rates_;
  std::thread thread_;
};

}  // namespace kvreplay
