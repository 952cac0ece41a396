#include "trace_capture/recorder.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

std::size_t sz(std::int64_t value) { return static_cast<std::size_t>(value); }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr std::align_val_t kAlign{64};
constexpr Pos kJoined = 16;            // tokens that are written at once at most, where they came one by one
constexpr std::size_t kMaxSlots = 64;  // more would not help, and pinned memory is slow to take

// Exponents of all ones are infinite or NaN. A plain reduction, which compilers vectorise.
template <typename Bits>
bool all_finite(std::span<const std::byte> data, Bits sign_off, Bits infinite) {
  Bits largest = 0;
  for (std::size_t i = 0; i < data.size(); i += sizeof(Bits)) {
    Bits bits;
    std::memcpy(&bits, data.data() + i, sizeof(bits));
    largest = std::max<Bits>(largest, bits & sign_off);
  }
  return largest < infinite;
}

bool all_finite(ElementType element, std::span<const std::byte> data) {
  switch (element) {
    case ElementType::f16:
      return all_finite<std::uint16_t>(data, 0x7fffU, 0x7c00U);
    case ElementType::bf16:
      return all_finite<std::uint16_t>(data, 0x7fffU, 0x7f80U);
    case ElementType::f32:
      return all_finite<std::uint32_t>(data, 0x7fffffffU, 0x7f800000U);
  }
  return false;
}

// `data` is (heads, n, head_dim); token_of(i) is the token of row i.
template <typename TokenOf>
void check_finite(const char* name, int layer, ElementType element, std::span<const std::byte> data, std::size_t n,
                  std::size_t head_dim, TokenOf&& token_of) {
  if (all_finite(element, data)) {
    return;
  }
  std::vector<float> values(data.size() / size_of(element));
  widen(element, data.data(), values);
  const auto bad = std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
  const std::size_t row = sz(bad - values.begin()) / head_dim;
  const std::string where = fmt::format("layer {}: {} of head {} at token {}", layer, name, row / n, token_of(row % n));
  if (element == ElementType::f16 && std::isinf(*bad)) {
    throw ConfigError(where + " is beyond 65504, the largest f16; capture with --dtype bf16 or f32");
  }
  throw ConfigError(where + " is not a finite number: these weights do not compute, or not in this precision");
}

}  // namespace

SlotMemory host_memory() {
  return {[](std::size_t bytes) { return static_cast<std::byte*>(::operator new(bytes, kAlign)); },
          [](std::byte* slot) { ::operator delete(slot, kAlign); }};
}

Recorder::Recorder(RecordPlan plan, TraceWriter& writer, Options options)
    : plan_(std::move(plan)), writer_(writer), options_(std::move(options)), last_commit_(Clock::now()) {
  KVREPLAY_CHECK(!plan_.layers.empty() && plan_.capacity > 0 && options_.max_pass > 0);
  if (!options_.memory.allocate) {
    options_.memory = host_memory();
  }
  options_.max_pass = std::min(options_.max_pass, plan_.capacity);
  slot_bytes_ = std::max(largest_packet(plan_, options_.max_pass, 1), largest_packet(plan_, 1, plan_.layers.size()));
  n_rows_.resize(plan_.layers.size(), 0);
  const std::size_t n = std::clamp<std::size_t>(options_.stage_bytes / slot_bytes_, 2, kMaxSlots);
  try {
    slots_.reserve(n);
    free_.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      slots_.push_back(options_.memory.allocate(slot_bytes_));
      free_.push_back(n - 1 - i);
    }
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    for (std::byte* slot : slots_) {
      options_.memory.release(slot);
    }
    throw;
  }
}

Recorder::~Recorder() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
  for (std::byte* slot : slots_) {
    options_.memory.release(slot);
  }
}

std::size_t Recorder::n_slots() const { return slots_.size(); }

std::size_t Recorder::slot_bytes() const { return slot_bytes_; }

int Recorder::index_of(int layer) const {
  const auto at = std::lower_bound(plan_.layers.begin(), plan_.layers.end(), layer);
  return at != plan_.layers.end() && *at == layer ? static_cast<int>(at - plan_.layers.begin()) : -1;
}

bool Recorder::fits(Pos n) const { return largest_packet(plan_, n, plan_.layers.size()) <= slot_bytes_; }

void Recorder::rethrow_failure() const {
  if (failure_) {
    std::rethrow_exception(failure_);
  }
}

Recorder::Slot Recorder::acquire(Pos first, Pos n, std::size_t begin, std::size_t end) {
  Slot slot;
  slot.layout = packet_layout(plan_, first, n, begin, end);
  KVREPLAY_CHECK(slot.layout.bytes <= slot_bytes_);
  std::unique_lock lock(mutex_);
  if (free_.empty() && !failure_) {
    const auto start = Clock::now();
    changed_.wait(lock, [this] { return !free_.empty() || failure_; });
    rates_.stall_seconds += seconds_since(start);
  }
  rethrow_failure();
  slot.index = free_.back();
  free_.pop_back();
  slot.bytes = {slots_[slot.index], slot.layout.bytes};
  return slot;
}

void Recorder::submit(const Slot& slot, std::function<void()> ready) {
  Item item;
  item.is_slot = true;
  item.slot = slot;
  item.ready = std::move(ready);
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(item));
  }
  changed_.notify_all();
}

void Recorder::tokens(std::span<const std::int32_t> ids, std::span<const float> logprob,
                      std::span<const std::string> pieces) {
  Item item;
  item.ids.assign(ids.begin(), ids.end());
  item.logprob.assign(logprob.begin(), logprob.end());
  item.pieces.assign(pieces.begin(), pieces.end());
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(item));
  }
  changed_.notify_all();
}

void Recorder::record(int layer, Pos first, Pos n, const LayerRows& rows) {
  const int index = index_of(layer);
  if (index < 0) {
    return;
  }
  const std::size_t q_row = sz(plan_.n_heads) * sz(plan_.head_dim), kv_row = sz(plan_.n_kv_heads) * sz(plan_.head_dim);
  const auto part = [](std::span<const float> all, std::size_t begin, std::size_t size) {
    return all.empty() ? all : all.subspan(begin, size);
  };
  for (Pos done = 0; done < n;) {
    const Pos now = std::min(n - done, options_.max_pass);
    const Slot slot = acquire(first + done, now, sz(index), sz(index) + 1);
    pack(plan_, slot.layout, 0,
         {.q = part(rows.q, sz(done) * q_row, sz(now) * q_row),
          .k = part(rows.k, sz(done) * kv_row, sz(now) * kv_row),
          .v = part(rows.v, sz(done) * kv_row, sz(now) * kv_row),
          .out = part(rows.out, sz(done) * q_row, sz(now) * q_row)},
         slot.bytes);
    submit(slot);
    done += now;
  }
}

void Recorder::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
  rethrow_failure();
  const auto start = Clock::now();
  commit();
  rates_.write_seconds += seconds_since(start);
}

Recorder::Rates Recorder::rates() const {
  const std::lock_guard lock(mutex_);
  return rates_;
}

Pos Recorder::n_complete() const { return std::min(n_tokens_, *std::min_element(n_rows_.begin(), n_rows_.end())); }

// The first tokens at once: from then on a killed capture can be recovered.
bool Recorder::commit_due() const {
  return seconds_since(last_commit_) >= options_.commit_seconds || (writer_.n_committed() == 0 && n_complete() > 0);
}

void Recorder::commit() {
  const Pos n = n_complete();
  if (n > writer_.n_committed()) {
    writer_.commit(n);
  }
  last_commit_ = Clock::now();
}

// One after another in the file as they come from the decoder, the rows of single tokens would be many tiny writes (256
// bytes for each head). Where the file falls behind, the packets that wait are joined.
std::vector<Recorder::Item> Recorder::take() {
  std::vector<Item> items;
  Pos n = 0, next = 0;
  std::span<const int> layers;
  while (!queue_.empty()) {
    const Item& item = queue_.front();
    if (item.is_slot) {
      const PacketLayout& layout = item.slot.layout;
      const bool follows = n > 0 && layout.first == next && layout.layers.data() == layers.data() &&
                           layout.layers.size() == layers.size() && n + layout.n <= kJoined;
      if (n > 0 && !follows) {
        break;
      }
      n += layout.n;
      next = layout.first + layout.n;
      layers = layout.layers;
    }
    items.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  return items;
}

void Recorder::gather(const Slot& slot, const PacketLayout& joined) {
  const PacketLayout& layout = slot.layout;
  const std::size_t head_dim = sz(plan_.head_dim), row = head_dim * size_of(plan_.element);
  // (heads, n, row) of the slot, as rows `first` and up of (heads, n_joined, row).
  const auto copy = [&](std::size_t from, std::size_t to, int heads, std::size_t first, std::size_t n,
                        std::size_t n_joined, std::size_t bytes) {
    for (std::size_t head = 0; n > 0 && head < sz(heads); ++head) {
      std::memcpy(joined_.data() + to + (head * n_joined + first) * bytes, slot.bytes.data() + from + head * n * bytes,
                  n * bytes);
    }
  };
  const std::size_t token = sz(layout.first - joined.first), n = sz(layout.n), n_joined = sz(joined.n);
  const std::size_t query = sz(layout.queries.data() - joined.queries.data());
  const std::size_t output = sz(layout.outputs.data() - joined.outputs.data());
  for (std::size_t i = 0; i < layout.at.size(); ++i) {
    const LayerLayout &from = layout.at[i], &to = joined.at[i];
    copy(from.k, to.k, plan_.n_kv_heads, token, n, n_joined, row);
    copy(from.v, to.v, plan_.n_kv_heads, token, n, n_joined, row);
    copy(from.q, to.q, plan_.n_heads, query, layout.queries.size(), joined.queries.size(), row);
    copy(from.out, to.out, plan_.n_heads, output, layout.outputs.size(), joined.outputs.size(),
         head_dim * sizeof(float));
  }
}

void Recorder::write_rows(const PacketLayout& layout, std::span<const std::byte> bytes) {
  const std::size_t n = sz(layout.n), m = layout.queries.size(), c = layout.outputs.size();
  const std::size_t head_dim = sz(plan_.head_dim), n_heads = sz(plan_.n_heads), row = head_dim * size_of(plan_.element);
  std::vector<float> out(n_heads * head_dim);  // of one token
  for (std::size_t i = 0; i < layout.at.size(); ++i) {
    const int layer = layout.layers[i];
    const LayerLayout& at = layout.at[i];
    const std::size_t kv_bytes = sz(plan_.n_kv_heads) * n * row;
    const auto k = bytes.subspan(at.k, kv_bytes), v = bytes.subspan(at.v, kv_bytes),
               q = bytes.subspan(at.q, n_heads * m * row),
               outputs = bytes.subspan(at.out, n_heads * c * head_dim * sizeof(float));
    const auto token = [&](std::size_t t) { return layout.first + static_cast<Pos>(t); };
    check_finite("k", layer, plan_.element, k, n, head_dim, token);
    check_finite("v", layer, plan_.element, v, n, head_dim, token);
    check_finite("q", layer, plan_.element, q, m, head_dim, [&](std::size_t j) { return layout.queries[j]; });
    check_finite("the attention output", layer, ElementType::f32, outputs, c, head_dim,
                 [&](std::size_t j) { return layout.outputs[j]; });
    writer_.append(layer, layout.n, k, v, q);
    for (std::size_t j = 0; j < c; ++j) {
      for (std::size_t head = 0; head < n_heads; ++head) {
        std::memcpy(out.data() + head * head_dim, outputs.data() + (head * c + j) * head_dim * sizeof(float),
                    head_dim * sizeof(float));
      }
      writer_.write_output(layer, layout.outputs[j], out);
    }
    const std::size_t index = sz(&layout.layers[i] - plan_.layers.data());
    n_rows_[index] += layout.n;
  }
}

void Recorder::write(std::vector<Item>& items) {
  std::vector<const Slot*> slots;
  Pos n = 0;
  for (Item& item : items) {
    if (item.ready) {
      std::exchange(item.ready, nullptr)();
    }
    if (item.is_slot) {
      slots.push_back(&item.slot);
      n += item.slot.layout.n;
    }
  }
  if (slots.size() == 1) {
    write_rows(slots[0]->layout, slots[0]->bytes);
  } else if (!slots.empty()) {
    const PacketLayout& first = slots[0]->layout;
    const std::size_t begin = sz(first.layers.data() - plan_.layers.data());
    const PacketLayout joined = packet_layout(plan_, first.first, n, begin, begin + first.layers.size());
    joined_.resize(std::max(joined_.size(), joined.bytes));
    for (const Slot* slot : slots) {
      gather(*slot, joined);
    }
    write_rows(joined, std::span(joined_).first(joined.bytes));
  }
  for (const Item& item : items) {
    if (!item.is_slot) {
      writer_.append_tokens(item.ids, {}, item.logprob, item.pieces);
      n_tokens_ += static_cast<Pos>(item.ids.size());
    }
  }
}

void Recorder::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    const auto something = [this] { return !queue_.empty() || closing_; };
    const bool failed = failure_ != nullptr;
    if (failed) {
      changed_.wait(lock, something);
    } else {
      // Wakes up in time to commit what came last, also where nothing follows for long.
      const auto due = last_commit_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
                                          std::clamp(options_.commit_seconds, 0.01, 3600.0)));
      changed_.wait_until(lock, due, something);
    }
    if (queue_.empty() && closing_) {
      return;
    }
    std::vector<Item> items = take();
    busy_ = true;
    lock.unlock();

    const auto start = Clock::now();
    std::exception_ptr failure;
    try {
      if (!failed) {
        write(items);
        if (commit_due()) {
          commit();
        }
      }
    } catch (...) {
      failure = std::current_exception();
    }
    for (Item& item : items) {
      try {
        if (item.ready) {
          item.ready();  // nothing is written any more, but a copy into the slot may still be under way
        }
      } catch (...) {  // said already
      }
    }
    const double busy = seconds_since(start);

    lock.lock();
    if (failure && !failure_) {
      failure_ = failure;
    }
    busy_ = false;
    rates_.write_seconds += busy;
    for (const Item& item : items) {
      if (item.is_slot) {
        free_.push_back(item.slot.index);
        rates_.bytes += failure_ ? 0 : item.slot.layout.bytes;
      }
    }
    changed_.notify_all();
  }
}

}  // namespace kvreplay
