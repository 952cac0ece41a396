// Everything of a trace file but the bulk data: groups, attributes, token columns, and the empty
// arrays. Shared by the writer (which then fills rows as they come) and repack (which copies whole
// arrays).
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "traces/hash.hpp"
#include "traces/hdf5.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

enum class Profile {
  working,  // contiguous, room for every token from the start: fast to write and to read
  archive,  // chunked, shuffle + deflate: smaller
};

struct ArchiveLayout {
  Pos chunk_tokens = 2048;  // 1024 to 4096
  int deflate = 4;          // 1 to 9
};

// What one layer of a new file holds.
struct LayerPlan {
  int layer = 0;
  bool has_q = true, q_all = true;  // q_all: one query per token, and no q_index
  std::vector<Pos> q_index;         // where not q_all
  std::vector<Pos> out_index;       // empty = no outputs
  ElementType out_type = ElementType::f32;
  int hidden = 0;  // rows of w_o; 0 = none
  ElementType w_o_type = ElementType::f32;
  std::vector<std::pair<std::string, ElementType>> scores;
};

struct TracePlan {
  TraceInfo info;    // all that is not bulk; n_tokens is ignored, layers is taken from `layers`
  Pos capacity = 0;  // tokens that the arrays have room for
  bool has_logprob = false;
  std::size_t piece_bytes = 0;  // width of the longest piece of text; 0 = no pieces
  std::vector<LayerPlan> layers;
  Profile profile = Profile::working;
  ArchiveLayout archive;
};

// Adds spans, or replaces those of the same names. Throws std::invalid_argument: an empty name, a span without tokens
// or beyond the trace's n_tokens.
void name_spans(TraceInfo& info, const std::vector<Span>& spans);

hdf5::Type storage_type(ElementType type);
std::string layer_name(int layer);  // "004"

// Writes all of it. Positions default to 0, 1, ..., and phase follows from prompt_len; the other
// token columns are written where `info` has them and only reserved where it has not.
void write_skeleton(const hdf5::Group& root, const TracePlan& plan, Pos n_valid);

// The dataset of one bulk array ("k", "scores/NAME") in a file that write_skeleton made.
hdf5::Dataset array_dataset(const hdf5::Group& root, int layer, const std::string& name);

// Marks a finished file as complete and writes its hashes, all in place: the skeleton kept room for
// them, so that no block of metadata moves.
void seal(const hdf5::Group& root, const TraceInfo& info, const TraceHashes& hashes);

}  // namespace kvreplay
