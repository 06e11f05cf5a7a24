// Causal attention of training and its gradients for processors with AMX tiles. `attention.py` says what is computed.
//
// Everything is cut into blocks of 64 queries and 64 keys, as FlashAttention does (arXiv 2205.14135), and scores are
// kept transposed, [keys, queries]: lanes of a vector are then queries, so that maxima and sums over keys need no
// exchange between lanes, and a block of probabilities is the left factor of a product just as it is.
//
// A product of tiles takes its right factor in pairs: the 32-bit word [p][n] holds the rows 2p and 2p + 1 of column n
// in bfloat16. "Pairs over x" names a matrix [64, n] stored so, as [32][n] words.
//
// Shapes: queries `[B, HQ, T, 64]`, keys and values `[B, HK, T, 64]`, outputs and their gradients `[B, T, HQ, 64]`, all
// bfloat16 and contiguous; `log_sums` `[B, HQ, T]` float32, in powers of 2. T is a multiple of 64.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr int DIM = 64, BLOCK = 64, LANES = 16, PAIRS = 32, TILE_BYTES = 64;
constexpr float MASKED = -1e30f;  // finite: its exponential is 0, without the NaN of infinity less infinity

using bf16 = uint16_t;
struct alignas(64) HalfBlock { bf16 at[BLOCK][64]; };
struct alignas(64) PairBlock { uint32_t at[PAIRS][64]; };
struct alignas(64) FloatBlock { float at[64][64]; };

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// ---- Vectors -------------------------------------------------------------------------------------------------------

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// 2^x for x <= 0 and a little above: error below 5e-5 of the value, a hundredth of bfloat16's step.
inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 result = _mm512_set1_ps(0.00961813f);
    for (const float factor : {0.0555041f, 0.240227f, 0.693147f, 1.0f})
        result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(result, whole);
}

inline __m256i to_halves(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512i as_pairs(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Transposes 16 x 16 words.
inline void transpose(__m512i rows[16]) {
    __m512i other[16];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int i = 0; i < 4; ++i) {
            other[half + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + i + 4], 0x88);
            other[half + i + 4] = _mm512_shuffle_i32x4(rows[half + i], rows[half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
    }
}

// ---- Other layouts of a block of 64 rows of 64 -----------------------------------------------------------------------

// Rows `[64][64]`, `stride` apart, to pairs over their columns: `[32 column pairs][64 rows]`.
void pair_columns(const bf16* rows, int64_t stride, PairBlock& out) {
    for (int first = 0; first < BLOCK; first += LANES)
        for (int pair = 0; pair < PAIRS; pair += LANES) {
            __m512i words[16];
            for (int i = 0; i < 16; ++i) words[i] = load(rows + (first + i) * stride + 2 * pair);
            transpose(words);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(&out.at[pair + i][first], words[i]);
        }
}

// Rows to pairs over themselves: `[32 row pairs][64 columns]`.
void pair_rows(const bf16* rows, int64_t stride, PairBlock& out) {
    for (int pair = 0; pair < PAIRS; ++pair)
        for (int column = 0; column < 64; column += LANES) {
            const bf16* even = rows + 2 * pair * stride + column;
            _mm512_store_si512(
                &out.at[pair][column],
                as_pairs(_mm256_loadu_si256((const __m256i*)even), _mm256_loadu_si256((const __m256i*)(even + stride))));
        }
}

// Rows to their transpose, `[64 columns][64 rows]`.
void transpose_halves(const bf16* rows, int64_t stride, HalfBlock& out) {
    PairBlock pairs;
    pair_columns(rows, stride, pairs);
    for (int pair = 0; pair < PAIRS; ++pair)
        for (int row = 0; row < 64; row += LANES) {
            const __m512i words = load(&pairs.at[pair][row]);
            _mm256_store_si256((__m256i*)&out.at[2 * pair][row], _mm512_cvtepi32_epi16(words));
            _mm256_store_si256((__m256i*)&out.at[2 * pair + 1][row], _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
        }
}

// A transposed sum `[64 columns][64 rows]` to bfloat16 rows, each times the factor of its row.
void store_transposed(const FloatBlock& sums, const float* row_factors, bf16* rows, int64_t stride) {
    for (int column = 0; column < DIM; column += LANES)
        for (int row = 0; row < BLOCK; row += LANES) {
            __m512i words[16];
            for (int i = 0; i < 16; ++i) words[i] = load(&sums.at[column + i][row]);
            transpose(words);
            for (int i = 0; i < 16; ++i) {
                const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(words[i]), _mm512_set1_ps(row_factors[row + i]));
                _mm256_storeu_si256((__m256i*)(rows + (row + i) * stride + column), to_halves(value));
            }
        }
}

void store_rows(const FloatBlock& sums, bf16* rows) {
    for (int row = 0; row < BLOCK; ++row)
        for (int column = 0; column < DIM; column += LANES)
            _mm256_storeu_si256(
                (__m256i*)(rows + row * DIM + column), to_halves(_mm512_load_ps(&sums.at[row][column])));
}

// ---- Products of tiles -----------------------------------------------------------------------------------------------

// out `[64][64]` (+)= left `[64][64]`, rows `stride` apart, times right, in pairs over the inner dimension.
template <bool ADD>
void multiply(FloatBlock& out, const bf16* left, int64_t stride, const PairBlock& right) {
    constexpr int OUT_STRIDE = sizeof(out.at[0]), RIGHT_STRIDE = sizeof(right.at[0]);
    for (int row = 0; row < 64; row += 32)
        for (int column = 0; column < 64; column += 32) {
            if (ADD) {
                _tile_loadd(0, &out.at[row][column], OUT_STRIDE);
                _tile_loadd(1, &out.at[row][column + 16], OUT_STRIDE);
                _tile_loadd(2, &out.at[row + 16][column], OUT_STRIDE);
                _tile_loadd(3, &out.at[row + 16][column + 16], OUT_STRIDE);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int pair = 0; pair < PAIRS; pair += 16) {
                _tile_loadd(4, left + row * stride + 2 * pair, 2 * stride);
                _tile_loadd(5, left + (row + 16) * stride + 2 * pair, 2 * stride);
                _tile_loadd(6, &right.at[pair][column], RIGHT_STRIDE);
                _tile_loadd(7, &right.at[pair][column + 16], RIGHT_STRIDE);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, &out.at[row][column], OUT_STRIDE);
            _tile_stored(1, &out.at[row][column + 16], OUT_STRIDE);
            _tile_stored(2, &out.at[row + 16][column], OUT_STRIDE);
            _tile_stored(3, &out.at[row + 16][column + 16], OUT_STRIDE);
        }
}

template <bool ADD>
void multiply(FloatBlock& out, const HalfBlock& left, const PairBlock& right) {
    multiply<ADD>(out, left.at[0], 64, right);
}

// Lanes of queries from `first` on that see `key`; both count from the start of a block on the diagonal.
inline __mmask16 seen(int first, int key) {
    return key <= first ? 0xffff : key >= first + LANES ? 0 : (__mmask16)(0xffff << (key - first));
}

// ---- Tasks: one batch element and key head -------------------------------------------------------------------------

struct Sizes {
    int64_t batch, query_heads, key_heads, tokens;
    int64_t blocks() const { return tokens / BLOCK; }
    int64_t group() const { return query_heads / key_heads; }
    int64_t tasks() const { return batch * key_heads; }
    // Rows of the first token: [.., HEAD, T, 64] and, of outputs, [B, T, HQ, 64].
    int64_t key_rows(int64_t task) const { return task * tokens * DIM; }
    int64_t query_head(int64_t task, int64_t member) const { return task * group() + member; }
    int64_t query_rows(int64_t task, int64_t member) const { return query_head(task, member) * tokens * DIM; }
    int64_t output_rows(int64_t task, int64_t member) const {
        const int64_t element = task / key_heads, head = task % key_heads * group() + member;
        return (element * tokens * query_heads + head) * DIM;
    }
    int64_t output_stride() const { return query_heads * DIM; }
};

// One block of transposed scores to the sums of the softmax; leaves the probabilities in pairs over keys.
void softmax_block(
    const FloatBlock& scores, float scale, bool on_diagonal, float* maxima, float* sums, float* kept, PairBlock& out
) {
    for (int first = 0; first < BLOCK; first += LANES) {
        const __m512 factor = _mm512_set1_ps(scale), masked = _mm512_set1_ps(MASKED);
        auto score = [&](int key) {
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(&scores.at[key][first]), factor);
            return on_diagonal ? _mm512_mask_mov_ps(masked, seen(first, key), value) : value;
        };
        const __m512 before = _mm512_load_ps(maxima + first);
        __m512 largest = before, sum = _mm512_setzero_ps();
        for (int key = 0; key < BLOCK; ++key) largest = _mm512_max_ps(largest, score(key));
        for (int pair = 0; pair < PAIRS; ++pair) {
            const __m512 even = power_of_two(_mm512_sub_ps(score(2 * pair), largest));
            const __m512 odd = power_of_two(_mm512_sub_ps(score(2 * pair + 1), largest));
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            _mm512_store_si512(&out.at[pair][first], as_pairs(to_halves(even), to_halves(odd)));
        }
        const __m512 share = power_of_two(_mm512_sub_ps(before, largest));
        _mm512_store_ps(kept + first, share);
        _mm512_store_ps(maxima + first, largest);
        _mm512_store_ps(sums + first, _mm512_fmadd_ps(_mm512_load_ps(sums + first), share, sum));
    }
}

void attend_task(
    const Sizes& sizes, int64_t task, float scale, const bf16* queries, const bf16* keys, const bf16* values, bf16* outputs,
    float* log_sums
) {
    keys += sizes.key_rows(task);
    values += sizes.key_rows(task);
    std::vector<HalfBlock> turned_values(sizes.blocks());
    for (int64_t block = 0; block < sizes.blocks(); ++block)
        transpose_halves(values + block * BLOCK * DIM, DIM, turned_values[block]);
    PairBlock query_pairs, probabilities;
    FloatBlock scores, sums_of_values;
    alignas(64) float maxima[BLOCK], sums[BLOCK], kept[BLOCK];
    for (int64_t member = 0; member < sizes.group(); ++member)
        for (int64_t block = 0; block < sizes.blocks(); ++block) {
            pair_columns(queries + sizes.query_rows(task, member) + block * BLOCK * DIM, DIM, query_pairs);
            std::fill_n(maxima, BLOCK, MASKED);
            std::fill_n(sums, BLOCK, 0.0f);
            std::memset(&sums_of_values, 0, sizeof sums_of_values);
            for (int64_t key_block = 0; key_block <= block; ++key_block) {
                multiply<false>(scores, keys + key_block * BLOCK * DIM, DIM, query_pairs);
                softmax_block(scores, scale, key_block == block, maxima, sums, kept, probabilities);
                for (int row = 0; row < DIM; ++row)
                    for (int first = 0; first < BLOCK; first += LANES) {
                        float* at = &sums_of_values.at[row][first];
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_load_ps(kept + first)));
                    }
                multiply<true>(sums_of_values, turned_values[key_block], probabilities);
            }
            float* head_log_sums = log_sums + sizes.query_head(task, member) * sizes.tokens + block * BLOCK;
            for (int query = 0; query < BLOCK; ++query) {
                head_log_sums[query] = maxima[query] + __builtin_log2f(sums[query]);
                sums[query] = 1 / sums[query];
            }
            bf16* rows = outputs + sizes.output_rows(task, member) + block * BLOCK * sizes.output_stride();
            store_transposed(sums_of_values, sums, rows, sizes.output_stride());
        }
}

// Sum over the head's values of output times its gradient, for each query of a block.
void dot_rows(const bf16* outputs, const bf16* gradients, int64_t stride, float* dots) {
    for (int row = 0; row < BLOCK; ++row) {
        __m512 sum = _mm512_setzero_ps();
        for (int column = 0; column < DIM; column += LANES) {
            auto value = [&](const bf16* from) {
                const __m256i halves = _mm256_loadu_si256((const __m256i*)(from + row * stride + column));
                return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
            };
            sum = _mm512_fmadd_ps(value(outputs), value(gradients), sum);
        }
        dots[row] = _mm512_reduce_add_ps(sum);
    }
}

// Probabilities and the scores' gradients of one block, `[keys][queries]`; the latter in pairs over keys as well.
void gradient_block(
    const FloatBlock& scores, const FloatBlock& probability_gradients, float scale, float scale_of_gradients,
    bool on_diagonal, const float* log_sums, const float* dots, HalfBlock& probabilities, HalfBlock& gradients,
    PairBlock& gradient_pairs
) {
    for (int first = 0; first < BLOCK; first += LANES) {
        const __m512 factor = _mm512_set1_ps(scale), gradient_factor = _mm512_set1_ps(scale_of_gradients);
        const __m512 log_sum = _mm512_loadu_ps(log_sums + first), dot = _mm512_load_ps(dots + first);
        for (int pair = 0; pair < PAIRS; ++pair) {
            __m256i halves[2];
            for (int odd = 0; odd < 2; ++odd) {
                const int key = 2 * pair + odd;
                const __mmask16 lanes = on_diagonal ? seen(first, key) : 0xffff;
                const __m512 score = _mm512_fmsub_ps(_mm512_load_ps(&scores.at[key][first]), factor, log_sum);
                const __m512 probability = _mm512_maskz_mov_ps(lanes, power_of_two(score));
                const __m512 gradient = _mm512_mul_ps(
                    _mm512_mul_ps(probability, gradient_factor),
                    _mm512_sub_ps(_mm512_load_ps(&probability_gradients.at[key][first]), dot));
                halves[odd] = to_halves(gradient);
                _mm256_store_si256((__m256i*)&probabilities.at[key][first], to_halves(probability));
                _mm256_store_si256((__m256i*)&gradients.at[key][first], halves[odd]);
            }
            _mm512_store_si512(&gradient_pairs.at[pair][first], as_pairs(halves[0], halves[1]));
        }
    }
}

void gradients_task(
    const Sizes& sizes, int64_t task, float scale, float scale_of_gradients, const bf16* queries, const bf16* keys,
    const bf16* values, const bf16* outputs, const float* log_sums, const bf16* output_gradients, bf16* query_gradients,
    bf16* key_gradients, bf16* value_gradients
) {
    const int64_t first_row = sizes.key_rows(task), stride = sizes.output_stride();
    keys += first_row;
    values += first_row;
    std::vector<HalfBlock> turned_keys(sizes.blocks());
    std::vector<FloatBlock> key_sums(sizes.blocks()), value_sums(sizes.blocks());
    for (int64_t block = 0; block < sizes.blocks(); ++block)
        transpose_halves(keys + block * BLOCK * DIM, DIM, turned_keys[block]);
    PairBlock query_columns, query_pairs, gradient_columns, gradient_pairs, score_gradient_pairs;
    HalfBlock probabilities, score_gradients;
    FloatBlock scores, probability_gradients, query_sums;
    alignas(64) float dots[BLOCK], ones[BLOCK];
    std::fill_n(ones, BLOCK, 1.0f);
    for (int64_t member = 0; member < sizes.group(); ++member)
        for (int64_t block = 0; block < sizes.blocks(); ++block) {
            const int64_t query_row = sizes.query_rows(task, member) + block * BLOCK * DIM;
            const int64_t output_row = sizes.output_rows(task, member) + block * BLOCK * stride;
            const float* block_log_sums = log_sums + sizes.query_head(task, member) * sizes.tokens + block * BLOCK;
            pair_columns(queries + query_row, DIM, query_columns);
            pair_rows(queries + query_row, DIM, query_pairs);
            pair_columns(output_gradients + output_row, stride, gradient_columns);
            pair_rows(output_gradients + output_row, stride, gradient_pairs);
            dot_rows(outputs + output_row, output_gradients + output_row, stride, dots);
            std::memset(&query_sums, 0, sizeof query_sums);
            for (int64_t key_block = 0; key_block <= block; ++key_block) {
                multiply<false>(scores, keys + key_block * BLOCK * DIM, DIM, query_columns);
                multiply<false>(probability_gradients, values + key_block * BLOCK * DIM, DIM, gradient_columns);
                gradient_block(
                    scores, probability_gradients, scale, scale_of_gradients, key_block == block, block_log_sums, dots,
                    probabilities, score_gradients, score_gradient_pairs);
                multiply<true>(value_sums[key_block], probabilities, gradient_pairs);
                multiply<true>(key_sums[key_block], score_gradients, query_pairs);
                multiply<true>(query_sums, turned_keys[key_block], score_gradient_pairs);
            }
            store_transposed(query_sums, ones, query_gradients + query_row, DIM);
        }
    for (int64_t block = 0; block < sizes.blocks(); ++block) {
        store_rows(key_sums[block], key_gradients + first_row + block * BLOCK * DIM);
        store_rows(value_sums[block], value_gradients + first_row + block * BLOCK * DIM);
    }
}

// Runs `task(0 .. count)` on that many threads, each with its tiles set up.
template <typename Task>
void share_out(int64_t count, int64_t num_threads, Task task) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        TileConfig config;
        std::fill_n(config.row_bytes, 8, TILE_BYTES);
        std::fill_n(config.rows, 8, 16);
        _tile_loadconfig(&config);
        for (int64_t index; (index = next++) < count;) task(index);
        _tile_release();
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(num_threads, count); ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

}  // namespace

// Asks the kernel of the system for the tiles' registers; 0 if it grants them.
extern "C" int request_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

extern "C" void attend(
    int64_t batch, int64_t query_heads, int64_t key_heads, int64_t tokens, int64_t num_threads, float scale,
    const bf16* queries, const bf16* keys, const bf16* values, bf16* outputs, float* log_sums
) {
    const Sizes sizes{batch, query_heads, key_heads, tokens};
    const float scale_to_powers = scale * (float)M_LOG2E;
    share_out(sizes.tasks(), num_threads, [&](int64_t task) {
        attend_task(sizes, task, scale_to_powers, queries, keys, values, outputs, log_sums);
    });
}

extern "C" void attend_gradients(
    int64_t batch, int64_t query_heads, int64_t key_heads, int64_t tokens, int64_t num_threads, float scale,
    const bf16* queries, const bf16* keys, const bf16* values, const bf16* outputs, const float* log_sums,
    const bf16* output_gradients, bf16* query_gradients, bf16* key_gradients, bf16* value_gradients
) {
    const Sizes sizes{batch, query_heads, key_heads, tokens};
    const float scale_to_powers = scale * (float)M_LOG2E;
    share_out(sizes.tasks(), num_threads, [&](int64_t task) {
        gradients_task(
            sizes, task, scale_to_powers, scale, queries, keys, values, outputs, log_sums, output_gradients,
            query_gradients, key_gradients, value_gradients);
    });
}
