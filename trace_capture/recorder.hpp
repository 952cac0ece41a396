// Carries packets from a decoder to the trace file: a ring of equal slots, filled by the decoder, emptied in order by a
// writer thread. When all slots are full the decoder waits (nothing is ever dropped), and how long it waited is
// counted.
#pragma once
#include <chrono>
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

  // Writes through `writer`, which must outlive the recorder; nobody else may use it until finish(). The writer was
  // opened with the plan's layers, queries and outputs.
  Recorder(RecordPlan plan, TraceWriter& writer, Options options);
  ~Recorder();  // drains what was submitted
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  const RecordPlan& plan() const { return plan_; }
  std::size_t n_slots() const;
  std::size_t slot_bytes() const;
  // The index of a layer in plan().layers, or -1 if it is not recorded.
  int index_of(int layer) const;
  // May the rows of all recorded layers of a pass of n tokens travel in one packet? One token's always may.
  bool fits(Pos n) const;

  // A free slot for tokens [first, first + n) of the layers plan().layers[begin, end); waits until there is one.
  // Rethrows what stopped the writer thread.
  Slot acquire(Pos first, Pos n, std::size_t begin, std::size_t end);
  // The slot's bytes are complete once ready() returned (called on the writer thread; empty = complete now).
  void submit(const Slot& slot, std::function<void()> ready = {});
  // The ids of tokens whose rows were submitted. logprob, pieces: (ids) or empty.
  void tokens(std::span<const std::int32_t> ids, std::span<const float> logprob,
              std::span<const std::string> pieces = {});
  // acquire, pack and submit for one layer of a pass of any length: all that the CPU backend needs. A layer that is
  // not recorded is passed over.
  void record(int layer, Pos first, Pos n, const LayerRows& rows);

  // Waits until everything is in the file and committed; rethrows what went wrong. A value that the element type
  // cannot hold is a ConfigError that names layer, head and token.
  void finish();
  Rates rates() const;

 private:
  // Of the queue: a slot's rows, or (where is_slot is false) the ids of tokens.
  struct Item {
    bool is_slot = false;
    Slot slot;
    std::function<void()> ready;
    std::vector<std::int32_t> ids;
    std::vector<float> logprob;       // (ids) or empty
    std::vector<std::string> pieces;  // (ids) or empty
  };
  using Clock = std::chrono::steady_clock;
  void work();                           // the writer thread
  std::vector<Item> take();              // what is written together, from the queue; may be empty
  void write(std::vector<Item>& items);  // on the writer thread
  void write_rows(const PacketLayout& layout, std::span<const std::byte> bytes);
  void gather(const Slot& slot, const PacketLayout& joined);  // into joined_
  void commit();                                              // what all layers have
  Pos n_complete() const;                                     // tokens of which everything is written
  bool commit_due() const;  // is there something to commit, and has commit_seconds passed?
  void rethrow_failure() const;

  const RecordPlan plan_;
  TraceWriter& writer_;
  Options options_;
  std::vector<std::byte*> slots_;
  std::size_t slot_bytes_ = 0;

  // Of the writer thread alone, and of finish() when that rests.
  std::vector<Pos> n_rows_;  // (layers) rows written
  Pos n_tokens_ = 0;         // tokens whose ids are written
  Clock::time_point last_commit_;
  std::vector<std::byte> joined_;  // packets of single tokens, as one packet

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::vector<std::size_t> free_;  // the slot used last on top: it is in the cache
  std::deque<Item> queue_;
  std::exception_ptr failure_;
  bool closing_ = false, busy_ = false;
  Rates rates_;

  std::thread thread_;
};

}  // namespace kvreplay
