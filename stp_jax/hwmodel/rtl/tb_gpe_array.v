// Test bench: runs the jobs of jobs.hex on the array, fold by fold, and measures their cycles.
//
// It is the controller around the array: the edge that reads the images of `stp_jax.hwmodel.rtl`
// (their layout is in images.py), the output buffer, and the sequencing of folds. A fold ends when
// the last element's last sum is seen to complete, never after a computed number of cycles: the
// length of a fold is an observation. The next fold loads in the cycle that follows.
//
// Writes results.txt (a line a job: cycles, partial-sum reads, partial-sum writes, slots or passes that
// entered the array) and outputs.hex (the output buffer).
`timescale 1ns / 1ps
module tb_gpe_array;
    parameter ROWS = 2;
    parameter COLUMNS = 2;
    parameter GROUP = 8;
    parameter LANES = 1;         // 1: gpe_array, a slot a cycle; more: gpe_lanes_array, a pass of them
    parameter ENCODE = 0;        // 1: rows read weights.hex through weight_edge; 0: wire_slots.hex
    parameter JOBS = 1;
    parameter FILTERS = 1;       // of all jobs together
    parameter SLOT_WORDS = 1;
    parameter WEIGHT_WORDS = 1;
    parameter ACTIVATION_WORDS = 1;
    parameter OUTPUT_WORDS = 1;
    parameter MAX_CYCLES = 1;    // give up after as many
    localparam WIDTH = 8;
    localparam PSUM = 32;
    localparam INDEX = $clog2(GROUP);
    localparam EXPONENT = $clog2(WIDTH);
    parameter SLOT_BITS = 2 + EXPONENT + INDEX;  // a slot on the wires, as the images have it
    localparam PASS_BITS = LANES * SLOT_BITS;    // "slots" below are passes where LANES > 1
    localparam RESIDENT = GROUP * WIDTH;

    reg [31:0]         job_words [0:8*JOBS-1];
    reg [31:0]         filter_words [0:2*FILTERS-1];
    reg [PSUM-1:0]     bias_words [0:FILTERS-1];
    reg [PASS_BITS-1:0] slot_words [0:SLOT_WORDS-1];
    reg [RESIDENT-1:0] weight_words [0:WEIGHT_WORDS-1];
    reg [RESIDENT-1:0] activation_words [0:ACTIVATION_WORDS-1];
    reg [PSUM-1:0]     outputs [0:OUTPUT_WORDS-1];

    // The job in hand.
    integer job = 0;
    wire [31:0] row_folds        = job_words[8*job + 0];
    wire [31:0] column_folds     = job_words[8*job + 1];
    wire [31:0] filters          = job_words[8*job + 2];
    wire [31:0] slots            = job_words[8*job + 3];  // of a group in all filters together
    wire [31:0] pixels           = job_words[8*job + 4];
    wire [31:0] group_base       = job_words[8*job + 5];
    wire [31:0] activation_base  = job_words[8*job + 6];
    wire [31:0] output_base      = job_words[8*job + 7];
    reg  [31:0] term_base = 0, filter_base = 0;

    // Where the controller stands. Loading counts rows, streaming counts (filter, slot) of row 0.
    reg clock = 0, reset = 1, running = 0, loading = 1;
    reg [31:0] load_row = 0, row_fold = 0, column_fold = 0;
    reg [31:0] cycles = 0, total_cycles = 0, psum_reads = 0, psum_writes = 0, slots_in = 0;

    // ---- Edge of the rows. Row r fetches one cycle behind row r-1, its terms appear a cycle after.
    // The fetch of row 0 starts in the last cycle of loading.
    wire starts = running & loading & (load_row == ROWS - 1);
    reg  fetching = 0;                      // row 0 is past its first fetch
    reg  [31:0] filter = 0, slot = 0;
    wire fetch_0 = starts | fetching;
    // Filters have slots of their own: only this edge knows how many, and says which is the last.
    wire slot_ends = slot == filter_words[2*(filter_base + filter)] - 1;
    wire stream_ends = slot_ends & (filter == filters - 1);

    reg         fetch_d  [0:ROWS];          // [r]: the fetch of row r, delayed from row 0
    reg  [31:0] filter_d [0:ROWS];
    reg  [31:0] slot_d   [0:ROWS];
    wire [ROWS-1:0]                last_in, shown_of;
    wire [ROWS*LANES-1:0]          valid_in, sign_in;
    wire [ROWS*LANES*EXPONENT-1:0] exponent_in;
    wire [ROWS*LANES*INDEX-1:0]    index_in;

    genvar r, c, l;
    generate
        for (r = 0; r < ROWS; r = r + 1) begin : row
            wire        fetch  = r == 0 ? fetch_0 : fetch_d[r];
            wire [31:0] filter_r = r == 0 ? filter : filter_d[r];
            wire [31:0] slot_r   = r == 0 ? slot : slot_d[r];
            wire [31:0] group  = (row_fold * filters + filter_r) * ROWS + r;
            wire [31:0] slots_r  = filter_words[2*(filter_base + filter_r)];
            wire [31:0] before_r = filter_words[2*(filter_base + filter_r) + 1];
            reg  shown = 0, last = 0;       // a slot is at the array's edge; it ends a group

            always @(posedge clock) begin
                shown <= fetch & ~reset;
                last  <= fetch & ~reset & (slot_r == slots_r - 1);
                fetch_d[r+1]  <= fetch & ~reset;
                filter_d[r+1] <= filter_r;
                slot_d[r+1]   <= slot_r;
            end
            assign last_in[r] = last;
            assign shown_of[r] = shown;

            if (ENCODE) begin : encoded
                wire [LANES-1:0] valid;
                weight_edge #(.GROUP(GROUP), .WIDTH(WIDTH), .LANES(LANES)) edge_of_row (
                    .clock(clock),
                    .reset(reset),
                    .load(fetch & (slot_r == 0)),
                    .weights(weight_words[group_base + group]),
                    .valid(valid),
                    .sign(sign_in[r*LANES +: LANES]),
                    .exponent(exponent_in[r*LANES*EXPONENT +: LANES*EXPONENT]),
                    .index(index_in[r*LANES*INDEX +: LANES*INDEX])
                );
                assign valid_in[r*LANES +: LANES] = valid & {LANES{shown}};
            end else begin : packed_terms
                reg [PASS_BITS-1:0] pass = 0;
                wire [31:0] first = (row_fold * slots + before_r) * ROWS + r * slots_r;
                always @(posedge clock) pass <= slot_words[term_base + first + slot_r];
                for (l = 0; l < LANES; l = l + 1) begin : lane
                    localparam AT = r*LANES + l;
                    wire [SLOT_BITS-1:0] term = pass[l*SLOT_BITS +: SLOT_BITS];
                    assign valid_in[AT] = term[SLOT_BITS-1] & shown;
                    assign sign_in[AT] = term[SLOT_BITS-2];
                    assign exponent_in[AT*EXPONENT +: EXPONENT] = term[INDEX +: EXPONENT];
                    assign index_in[AT*INDEX +: INDEX] = term[0 +: INDEX];
                end
            end
        end
    endgenerate

    // ---- Edge of the columns: activations down from the top, row ROWS-1's first; partial sums of
    // earlier row folds in at the top, or the filters' biases; sums out at the bottom into the output
    // buffer.
    wire [COLUMNS*RESIDENT-1:0] activations_in;
    wire [COLUMNS*PSUM-1:0]     psum_in, psum;
    wire [COLUMNS-1:0]          psum_take, psum_done;
    wire [31:0] fold = row_fold * column_folds + column_fold;

    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [31:0] pixel = column_fold * COLUMNS + c;
            wire        real_pixel = pixel < pixels;     // else the column pads a ragged fold
            wire        earlier = real_pixel & (row_fold != 0);
            wire [31:0] address = output_base + pixel * filters;
            reg  [31:0] taken = 0, done = 0;             // filters of this fold
            reg  [31:0] store_address = 0;
            reg         store = 0;

            assign activations_in[c*RESIDENT +: RESIDENT] =
                activation_words[activation_base + (fold*ROWS + ROWS-1 - load_row)*COLUMNS + c];
            assign psum_in[c*PSUM +: PSUM] =
                earlier ? outputs[address + taken] : bias_words[filter_base + taken];

            always @(posedge clock) begin
                taken <= reset | loading ? 0 : taken + psum_take[c];
                done  <= reset | loading ? 0 : done + psum_done[c];
                store <= ~reset & psum_done[c] & real_pixel;
                store_address <= address + done;
                if (store) outputs[store_address] <= psum[c*PSUM +: PSUM];
            end
        end
    endgenerate

    generate
        if (LANES == 1) begin : serial
            gpe_array #(
                .ROWS(ROWS), .COLUMNS(COLUMNS), .GROUP(GROUP), .WIDTH(WIDTH), .PSUM(PSUM)
            ) array (
                .clock(clock), .reset(reset),
                .load(running & loading), .activations_in(activations_in),
                .valid_in(valid_in), .sign_in(sign_in), .exponent_in(exponent_in),
                .index_in(index_in), .last_in(last_in),
                .psum_in(psum_in), .psum_take(psum_take), .psum_done(psum_done), .psum(psum)
            );
        end else begin : parallel
            // The bus shows row ROWS-1's activations first.
            wire [ROWS-1:0] load = {{(ROWS-1){1'b0}}, running & loading} << (ROWS - 1 - load_row);
            gpe_lanes_array #(
                .ROWS(ROWS), .COLUMNS(COLUMNS), .GROUP(GROUP), .LANES(LANES), .WIDTH(WIDTH),
                .PSUM(PSUM)
            ) array (
                .clock(clock), .reset(reset),
                .load(load), .activations_in(activations_in),
                .valid_in(valid_in), .sign_in(sign_in), .exponent_in(exponent_in),
                .index_in(index_in), .active_in(shown_of), .last_in(last_in),
                .psum_in(psum_in), .psum_take(psum_take), .psum_done(psum_done), .psum(psum)
            );
        end
    endgenerate

    // ---- Events of the last column say when a fold is over.
    wire fold_ends = psum_done[COLUMNS-1] & (column[COLUMNS-1].done == filters - 1);
    wire job_ends = fold_ends & (row_fold == row_folds - 1) & (column_fold == column_folds - 1);

    // Events of this cycle on the real columns' partial sums.
    integer n;
    reg [31:0] reads_now, writes_now, slots_now;
    always @* begin
        reads_now = 0;
        writes_now = 0;
        slots_now = 0;
        for (n = 0; n < COLUMNS; n = n + 1)
            if (column_fold * COLUMNS + n < pixels) begin
                reads_now = reads_now + (psum_take[n] & (row_fold != 0));
                writes_now = writes_now + psum_done[n];
            end
        for (n = 0; n < ROWS; n = n + 1) slots_now = slots_now + shown_of[n];
    end

    integer results;
    always @(posedge clock) if (running) begin
        total_cycles <= total_cycles + 1;
        if (total_cycles > MAX_CYCLES) begin
            $display("FAIL: no end after %0d cycles, job %0d", MAX_CYCLES, job);
            $finish;
        end

        if (fetch_0) begin
            slot <= slot_ends ? 0 : slot + 1;
            filter <= stream_ends ? 0 : slot_ends ? filter + 1 : filter;
            fetching <= ~stream_ends;
        end
        if (loading) begin
            load_row <= load_row + 1;
            if (load_row == ROWS - 1) loading <= 0;
        end

        if (fold_ends) begin
            loading <= 1;
            load_row <= 0;
            row_fold <= row_fold == row_folds - 1 ? 0 : row_fold + 1;
            if (row_fold == row_folds - 1)
                column_fold <= column_fold == column_folds - 1 ? 0 : column_fold + 1;
        end
        if (job_ends) begin
            $fdisplay(results, "%0d %0d %0d %0d", cycles + 1, psum_reads + reads_now,
                      psum_writes + writes_now, slots_in + slots_now);
            cycles <= 0;
            psum_reads <= 0;
            psum_writes <= 0;
            slots_in <= 0;
            term_base <= term_base + row_folds * ROWS * slots;
            filter_base <= filter_base + filters;
            job <= job + 1;
            if (job == JOBS - 1) running <= 0;
        end else begin
            cycles <= cycles + 1;
            psum_reads <= psum_reads + reads_now;
            psum_writes <= psum_writes + writes_now;
            slots_in <= slots_in + slots_now;
        end
    end

    always #1 clock = ~clock;

    reg [8*256-1:0] waveform;
    initial if ($value$plusargs("waveform=%s", waveform)) begin
        $dumpfile(waveform);
        $dumpvars(0, tb_gpe_array);
    end

    initial begin
        if (SLOT_BITS != 2 + EXPONENT + INDEX) $display("FAIL: SLOT_BITS is %0d", SLOT_BITS);
        $readmemh("jobs.hex", job_words);
        $readmemh("filters.hex", filter_words);
        $readmemh("bias.hex", bias_words);
        if (ENCODE) $readmemh("weights.hex", weight_words);
        else $readmemh("wire_slots.hex", slot_words);
        $readmemh("activations.hex", activation_words);
        results = $fopen("results.txt", "w");
        repeat (ROWS + COLUMNS + 2) @(negedge clock);  // the reset passes through the array
        reset = 0;
        running = 1;
        wait (!running);
        @(negedge clock);
        @(negedge clock);  // the last sums reach the buffer a cycle after they complete
        $fclose(results);
        $writememh("outputs.hex", outputs);
        $finish;
    end
endmodule
