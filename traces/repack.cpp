#include "traces/repack.hpp"

#include <algorithm>
#include <stdexcept>

#include "traces/hash.hpp"
#include "traces/schema.hpp"
#include "traces/stored_array.hpp"

namespace kvreplay {
namespace {

LayerPlan plan_of(const TraceReader& trace, int layer) {
  LayerPlan plan;
  plan.layer = layer;
  const std::span<const Pos> q_index = trace.q_index(layer);
  plan.has_q = !q_index.empty();
  plan.q_all = q_index.size() == static_cast<std::size_t>(trace.info().n_tokens);
  plan.q_index.assign(q_index.begin(), q_index.end());
  if (trace.has_out(layer)) {
    const std::span<const Pos> out_index = trace.out_index(layer);
    plan.out_index.assign(out_index.begin(), out_index.end());
    plan.out_type = trace.array(layer, schema::kOut).type();
  }
  if (trace.has_w_o(layer)) {
    plan.hidden = trace.hidden(layer);
    plan.w_o_type = trace.array(layer, schema::kWO).type();
  }
  for (const std::string& name : trace.score_names(layer)) {
    plan.scores.emplace_back(name, trace.array(layer, std::string(schema::kScores) + "/" + name).type());
  }
  return plan;
}

// Copies `stored` into the block of the dataset that holds it: heads x rows x width, whichever of
// them the dataset has. `piece` rows at a time: one chunk's, so that every chunk is compressed
// once.
void copy_array(const StoredArray& stored, const hdf5::Dataset& to, const std::string& name, std::uint64_t piece) {
  std::vector<std::byte> rows;
  for (std::uint64_t head = 0; head < stored.n_heads(); ++head) {
    for (std::uint64_t begin = 0; begin < stored.n_rows(); begin += piece) {
      const std::uint64_t end = std::min(stored.n_rows(), begin + piece);
      rows.resize((end - begin) * stored.row_bytes());
      stored.read_raw(head, begin, end, rows);
      if (name == schema::kWO) {
        to.write_block({begin, 0}, {end - begin, stored.width()}, rows);
      } else if (name.starts_with(schema::kScores)) {
        to.write_block({head, begin}, {1, end - begin}, rows);
      } else {
        to.write_block({head, begin, 0}, {1, end - begin, stored.width()}, rows);
      }
    }
  }
}

}  // namespace

void repack(const std::filesystem::path& in, const std::filesystem::path& out, const RepackOptions& options) {
  const ArchiveLayout& layout = options.archive;
  if (layout.chunk_tokens < 1 || layout.deflate < 1 || layout.deflate > 9) {
    throw std::invalid_argument("an archive has chunks of at least 1 token and deflate 1 to 9");
  }
  const TraceReader trace(in);
  TracePlan plan;
  plan.info = trace.info();
  plan.capacity = trace.info().n_tokens;
  plan.has_logprob = !trace.info().logprob.empty();
  for (const std::string& piece : trace.info().pieces) {
    plan.piece_bytes = std::max({plan.piece_bytes, piece.size(), std::size_t{1}});
  }
  plan.profile = options.profile;
  plan.archive = layout;
  for (const int layer : trace.info().layers) {
    plan.layers.push_back(plan_of(trace, layer));
  }
  if (!options.note.empty()) {
    plan.info.provenance += (plan.info.provenance.empty() ? "" : "\n") + options.note;
  }
  name_spans(plan.info, options.spans);

  // Not NAME.part: that may be the very capture that is being recovered.
  const std::filesystem::path part = out.string() + ".packing";
  hdf5::File file = hdf5::File::create(out, part);
  try {
    write_skeleton(file.root(), plan, plan.capacity);
    for (const int layer : trace.info().layers) {
      trace.check_unchanged();
      for (const std::string& name : trace.array_names(layer)) {
        if (trace.array(layer, name).n_rows() > 0) {
          copy_array(trace.array(layer, name), array_dataset(file.root(), layer, name), name,
                     static_cast<std::uint64_t>(layout.chunk_tokens));
        }
      }
    }
    trace.check_unchanged();
    file.close();
    const TraceReader written(part);
    const TraceHashes hashes = hash_trace(written);
    hdf5::File again = hdf5::File::open_write(part);
    seal(again.root(), written.info(), hashes);
    again.close();
    file.publish();
  } catch (...) {
    file.discard();
    throw;
  }
}

}  // namespace kvreplay
